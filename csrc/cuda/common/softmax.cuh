// Pieces of a softmax over rows that the four lanes of a quad share, as in accumulators of
// tensor cores.
#pragma once

namespace rrattn::cuda {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

// A thread has accumulators of two rows; the second (`half` 1) is 8 rows further on. For element i
// of one of them: its place among the thread's accumulators, and its column from the thread's
// first.
__device__ constexpr int accumulator_index(int half, int i) { return i / 2 * 4 + half * 2 + i % 2; }
__device__ constexpr int accumulator_column(int i) { return i / 2 * 8 + i % 2; }

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Makes the compiler compute x here: ptxas would move it, and all that it needs, behind the next
// wgmma wait. It cannot know that the pause is never taken; if it were, it would do no harm.
__device__ inline void compute_here(float x) {
  asm volatile(
      "{\n.reg .pred huge;\nsetp.gt.f32 huge, %0, 0f7F000000;\n@huge nanosleep.u32 0;\n}" ::"f"(x)
      : "memory");
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace rrattn::cuda
