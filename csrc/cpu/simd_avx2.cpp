// The CPU stages for AVX2 with FMA: 16 registers hold a tile of 4 x 2 vectors.
#if defined(__x86_64__)
#define RRATTN_SIMD avx2
#define RRATTN_SIMD_LANES 8
#define RRATTN_SIMD_TILE_ROWS 4

// Headers that other files compile too come before the switch to this instruction set, so that no
// inline function that they share uses it.
#include "simd_includes.h"

#pragma GCC target("avx2,fma")
#include "simd_kernels.h"

namespace rrattn::cpu {
const Kernels kAvx2Kernels = avx2::make_kernels("avx2");
}
#endif
