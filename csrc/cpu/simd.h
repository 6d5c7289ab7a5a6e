// Vectors of floats, and the two inner loops that all CPU stages share (exp2 and multiply), for
// whatever instruction set the including file (simd_avx512.cpp, simd_avx2.cpp, simd_baseline.cpp)
// has switched on. The arithmetic uses GCC's vector extensions, so the same lines become AVX-512,
// AVX2, SSE or NEON.
//
// Everything here and in the files that include it is in a namespace named for the instruction set,
// and uses no template of the standard library. Otherwise the three builds could share a weak
// symbol, of which the linker might take the AVX-512 version for every machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace rrattn::cpu::RRATTN_SIMD {

constexpr int kLanes = RRATTN_SIMD_LANES;
constexpr int kTileRows = RRATTN_SIMD_TILE_ROWS;  // rows of a register tile
constexpr int kTileVecs = 2;                      // vectors of a register tile
constexpr int kStrip = kTileVecs * kLanes;        // columns of a register tile; stages step by it

typedef float Vec __attribute__((vector_size(4 * RRATTN_SIMD_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * RRATTN_SIMD_LANES)));

#define RRATTN_INLINE inline __attribute__((always_inline))

RRATTN_INLINE Vec load(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof(v));
  return v;
}
RRATTN_INLINE VecInt load(const int32_t* from) {
  VecInt v;
  memcpy(&v, from, sizeof(v));
  return v;
}
RRATTN_INLINE void store(float* to, Vec v) { memcpy(to, &v, sizeof(v)); }
RRATTN_INLINE Vec splat(float x) { return x - Vec{}; }
RRATTN_INLINE VecInt splat(int32_t x) { return x - VecInt{}; }
RRATTN_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// 1.5 * 2^23: adding it to a float rounds to a whole number, which is left in the low bits.
constexpr float kRounder = 12582912.f;

// 2^(n + f) for whole n and |f| <= 1/2, to about 1 ulp and exactly 2^n at f = 0; 0 for n <= -127
// (no denormals), infinity for n >= 128. 2^f is the minimax polynomial of degree 6 with its
// constant held at 1 (relative error 2e-9 before rounding).
RRATTN_INLINE Vec exp2_parts(Vec n, Vec f) {
  n = n < -127.f ? splat(-127.f) : n;
  n = n > 128.f ? splat(128.f) : n;
  Vec p = splat(0.000153533591f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  p = p * f + 1.f;
  const VecInt scale = ((VecInt)(n + kRounder) - 0x4b400000 + 127) << 23;
  return p * (Vec)scale;
}

// 2^x, NaN for NaN.
RRATTN_INLINE Vec exp2(Vec x) {
  x = x < -127.f ? splat(-127.f) : x;
  x = x > 128.f ? splat(128.f) : x;
  const Vec n = (x + kRounder) - kRounder;
  return exp2_parts(n, x - n);
}

// The nearest whole number; large floats are whole already.
RRATTN_INLINE Vec round_to_whole(Vec x) {
  return (x < 4194304.f) & (x > -4194304.f) ? (x + kRounder) - kRounder : x;
}

// 2^(x - base) for a whole base, NaN for NaN. Another base changes the result by exactly a power of
// two; that would not hold if the difference x - base were rounded.
RRATTN_INLINE Vec exp2_from(Vec x, Vec base) {
  x = x < -1e30f ? splat(-1e30f) : x;  // -infinity has no fraction
  const Vec n = round_to_whole(x);
  return exp2_parts(n - base, x - n);
}

enum class Into { kFresh, kSum, kScaledSum };

// A product of a[rows x depth] and b[depth x kStrip], into c[rows x kStrip]:
//
//   kFresh      c = a b
//   kSum        c = a b + c
//   kScaledSum  c = a b + c * column_scale
//
// Element (r, k) of a is a[r * a_row + k * a_depth]; rows of b and c are kStrip floats, one row
// after the other. `rows` is a multiple of kTileRows. The product is summed apart from c, which
// keeps rounding errors of long sums down.
template <Into kInto>
RRATTN_INLINE void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_row,
                            int64_t a_depth, const float* b, float* c,
                            const float* column_scale = nullptr) {
  for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
    Vec sum[kTileRows][kTileVecs] = {};
    const float* a_tile = a + r0 * a_row;
    for (int64_t k = 0; k < depth; ++k) {
      Vec b_vec[kTileVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) b_vec[v] = load(b + k * kStrip + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec a_vec = splat(a_tile[r * a_row + k * a_depth]);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVecs; ++v) sum[r][v] += a_vec * b_vec[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; ++v) {
        float* to = c + (r0 + r) * kStrip + v * kLanes;
        if (kInto == Into::kSum) sum[r][v] += load(to);
        if (kInto == Into::kScaledSum) sum[r][v] += load(to) * load(column_scale + v * kLanes);
        store(to, sum[r][v]);
      }
    }
  }
}

}  // namespace rrattn::cpu::RRATTN_SIMD
