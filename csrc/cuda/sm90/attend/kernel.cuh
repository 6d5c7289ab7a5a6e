// Block-sparse flash attention on Hopper.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv],
//   block_mask [B, Hq, Mq, words], sink [Hq] if given  ->  out [B, Lq, Hq, Dv], lse [B, Hq, Lq]
//
// The kernel is persistent. A thread block takes one row of the block mask at a time: 128 queries
// of a head, 64 for each of two consumer warp groups. Producer warps walk the row's bits and copy
// the queries and the selected tiles of keys and values to shared memory (TMA). Only the producers
// read the mask; they tell the consumers which tiles have hidden scores.
//
// With compensation tiles of mean keys and mean values follow those of a row's blocks, with the bits
// of those that stand in for theirs.
#pragma once

#include "consumer.cuh"

namespace rrattn::cuda::sm90::attend {

template <typename Traits, bool kUnseenKeys>
__device__ inline void init_shared(typename Traits::SharedStorage& shared) {
  constexpr int kConsumerWarps = kConsumerThreads / 32;  // a lane of each arrives
  shared.row_full.init(1);
  shared.row_empty.init(kConsumerThreads + (kUnseenKeys ? 3 : 2) * 32);
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    shared.query_full[consumer].init(1);
    shared.query_empty[consumer].init(kWarpGroup);
  }
  for (int slot = 0; slot < Traits::kKeySlots; ++slot) {
    shared.key_full[slot].init(1);
    shared.key_empty[slot].init(kConsumerThreads);
  }
  for (int slot = 0; slot < Traits::kValueSlots; ++slot) {
    shared.value_full[slot].init(1);
    shared.value_uncleared[slot].init(1);
    shared.value_empty[slot].init(kConsumerWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// kUnseenKeys: whether some blocks may hold keys that no row sees. Their values are then zeroed.
// kCompensate: whether means stand in for blocks. Params: KernelParams, or RaggedKernelParams.
template <typename Traits, bool kUnseenKeys, bool kCompensate, typename Params>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ Params params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = warp_group_index();
  if (threadIdx.x == 0) init_shared<Traits, kUnseenKeys>(shared);
  __syncthreads();
  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) produce_keys<Traits, kCompensate>(params, shared);
    if (warp == 1) produce_values<Traits, kUnseenKeys, kCompensate>(params, shared);
    if (warp == 2) produce_queries<Traits>(params, shared);
    if (kUnseenKeys && warp == 3) clear_values<Traits, kCompensate>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits, kUnseenKeys, kCompensate, Params>(params, shared, warp_group - 1)
        .consume_rows();
  }
}

}  // namespace rrattn::cuda::sm90::attend
