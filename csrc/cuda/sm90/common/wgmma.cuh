// The products of a warp group (wgmma).
#pragma once

#include <cute/tensor.hpp>

#include "barrier.cuh"

namespace rrattn::cuda::sm90 {

// Starts result = A B, or with ScaleOut::One result += A B, of a thread's fragments. Whoever uses
// the result waits for it (warpgroup_wait) first. The caller fences an A that lies in registers.
// kSteps: of the sums' steps of 16 terms, those to take, where the others are known to be 0; default:
// all.
template <cute::GMMA::ScaleOut kScaleOut, int kSteps = -1, typename Mma, typename A, typename B,
          typename Result>
__device__ inline void start_product(Mma& mma, const A& a, const B& b, Result& result) {
  mma.accumulate_ = kScaleOut;
  cute::warpgroup_fence_operand(result);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < (kSteps < 0 ? cute::size<2>(b) : kSteps); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), result);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

// Which of the thread block's warp groups this is. The compiler learns that it is the same for all
// threads of a warp.
__device__ inline int warp_group_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpGroup, 0);
}

}  // namespace rrattn::cuda::sm90
