// Gradients of block-sparse attention on Hopper.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv], grad_out [B, Lq, Hq, Dv],
//   block_mask [B, Hq, Mq, words], if given sink [Hq] and grad_lse [B, Hq, Lq]
//     ->  grad_query [B, Lq, Hq, D], grad_key [B, Lk, Hkv, D], grad_value [B, Lk, Hkv, Dv],
//         grad_sink [Hq]
//
// The kernels before this one prepare what it reads (common/backward/prepare.cuh): what S and dP start
// from, -lse / scale and -delta = grad_lse - rowsum(dO * O); if deterministic, the units of the sums
// of dQ; the transposed block mask. Those after it write the sums of dQ, scaled, as grad_query
// (finish_grad_query.cuh), and grad_sink (common/backward/finish_grad_sink.cuh).
//
// The kernel is persistent. A thread block takes a key block of a key head, walks the query blocks of
// the group's heads that selected it, or some parts of that walk (common/backward/work.cuh,
// merge_parts.cuh), keeps dK and dV in registers, and adds its share of dQ to the sums in the
// workspace (writer.cuh), and that of dK and dV if it had parts (turns.cuh, grad_keys.cuh).
#pragma once

#include "consumer.cuh"
#include "narrow/consumer.cuh"
#include "producer.cuh"
#include "turns.cuh"
#include "writer.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
__device__ inline void init_shared(typename Traits::SharedStorage& shared) {
  init_steps<Traits>(shared);
  for (Barrier& full : shared.grad_scores_full) full.init(kConsumerThreads);
  shared.sums_full.init(kConsumerThreads);
  shared.sums_empty.init(32);  // the writer
  cutlass::arch::fence_barrier_init();
}

// Consumer: that of the Traits' head size, Consumer or narrow::Consumer.
template <typename Traits, template <typename> class Consumer>
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
    if (threadIdx.x / 32 == 1) add_sums<Traits>(params, shared);
    if (threadIdx.x / 32 >= 2) keep_turns<Traits>(params, shared, threadIdx.x / 32 - 2);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(params, shared, warp_group - 1).consume_items();
  }
}

}  // namespace rrattn::cuda::sm90::backward
