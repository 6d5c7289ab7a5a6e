// The CPU stages for AVX-512: 32 registers hold a tile of 8 x 2 vectors.
#if defined(__x86_64__)
#define RRATTN_SIMD avx512
#define RRATTN_SIMD_LANES 16
#define RRATTN_SIMD_TILE_ROWS 8

// Headers that other files compile too come before the switch to this instruction set, so that no
// inline function that they share uses it.
#include "simd_includes.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "simd_kernels.h"

namespace rrattn::cpu {
const Kernels kAvx512Kernels = avx512::make_kernels("avx512");
}
#endif
