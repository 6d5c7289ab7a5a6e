// The gradients of block-sparse attention on Hopper for head sizes above 128: what the kernel for
// smaller ones does (../kernel.cuh), with consumers that have different tasks and add dQ to the sums
// themselves.
#pragma once

#include "../producer.cuh"
#include "../turns.cuh"
#include "consumer.cuh"

namespace rrattn::cuda::sm90::backward::wide {

template <typename Traits>
__device__ inline void init_shared(typename Traits::SharedStorage& shared) {
  init_steps<Traits>(shared);
  shared.probabilities_full.init(kWarpGroup);
  shared.probabilities_empty.init(kWarpGroup);
  for (int slot = 0; slot < Traits::kGradScoreSlots; ++slot) {
    shared.grad_scores_full[slot].init(kWarpGroup);
    shared.grad_scores_empty[slot].init(kWarpGroup);
  }
  cutlass::arch::fence_barrier_init();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = warp_group_index();
  if (threadIdx.x == 0) init_shared<Traits>(shared);
  __syncthreads();
  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) produce_steps<Traits>(params, shared);
    if (threadIdx.x / 32 >= 2) keep_turns<Traits>(params, shared, threadIdx.x / 32 - 2);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    if (warp_group == 1) {
      ValueConsumer<Traits>(params, shared, 0).consume_items();
    } else {
      KeyConsumer<Traits>(params, shared, 1).consume_items();
    }
  }
}

}  // namespace rrattn::cuda::sm90::backward::wide
