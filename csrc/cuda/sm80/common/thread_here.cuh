// The thread's number, for kernels that are short of registers.
#pragma once

namespace rrattn::cuda::sm80 {

// It is read anew. What follows from threadIdx.x may be computed ahead of a loop that has no registers
// for it.
__device__ inline int thread_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}

}  // namespace rrattn::cuda::sm80
