// The CPU stages for any processor: SSE2 on x86-64, NEON on aarch64.

#define RRATTN_SIMD baseline
#define RRATTN_SIMD_LANES 4
#define RRATTN_SIMD_TILE_ROWS 4

#include "simd_includes.h"
#include "simd_kernels.h"

namespace rrattn::cpu {
const Kernels kBaselineKernels = baseline::make_kernels("baseline");
}
