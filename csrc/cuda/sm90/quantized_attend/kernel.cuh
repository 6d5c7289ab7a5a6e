// Block-sparse flash attention in eight bits on Hopper: INT8 products of queries and keys, FP8 (e4m3)
// products of probabilities and values, as docs/quantization.md says.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv],
//   block_mask [B, Hq, Mq, words], sink [Hq] if given  ->  out [B, Lq, Hq, Dv], lse [B, Hq, Lq]
//
// First the inputs become tiles of eight bits in the workspace (quantize.cuh). The kernel over these
// is persistent and takes one row of the block mask at a time, as that of ../attend.
#pragma once

#include "consumer.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

template <typename Traits, bool kUnseenKeys>
__device__ inline void init_shared(typename Traits::SharedStorage& shared) {
  constexpr int kConsumerWarps = kConsumerThreads / 32;  // a lane of each arrives
  for (int slot = 0; slot < Traits::kRowSlots; ++slot) {
    shared.row_full[slot].init(1);
    shared.row_empty[slot].init(kConsumerThreads + (kUnseenKeys ? 3 : 2) * 32);
  }
  for (int slot = 0; slot < Traits::kQuerySlots; ++slot) {
    shared.query_full[slot].init(1);
    shared.query_empty[slot].init(kConsumerThreads);
  }
  for (int slot = 0; slot < Traits::kKeySlots; ++slot) {
    shared.key_full[slot].init(1);
    shared.key_empty[slot].init(kConsumerThreads);
  }
  for (int slot = 0; slot < Traits::kValueSlots; ++slot) {
    shared.value_full[slot].init(kUnseenKeys ? 32 : 1);  // the lanes of a producer warp
    shared.value_uncleared[slot].init(1);
    shared.value_empty[slot].init(kConsumerWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// The columns of ones behind the values of each slot, which no copy touches.
template <typename Traits>
__device__ void fill_ones(typename Traits::SharedStorage& shared) {
  constexpr uint32_t kOnes = 0x38383838;  // 1 in e4m3, four times
  for (auto& slot : shared.value) {
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kSumColumns * kBlockSize / 4;
         i += Traits::kThreads) {
      const int column = i / (kBlockSize / 4), position = i % (kBlockSize / 4) * 4;
      *reinterpret_cast<uint32_t*>(
          reinterpret_cast<uint8_t*>(&slot) +
          typename Traits::ValueOffsets{}(Traits::kHeadDim + column, position)) =
          position / 16 == column ? kOnes : 0;
    }
  }
  fence_async_proxy_shared();  // wgmma reads what these stores wrote
}

// kUnseenKeys: whether some blocks may hold keys that no row sees. Their values are then zeroed.
template <typename Traits, bool kUnseenKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    quantized_attend_kernel(const __grid_constant__ KernelParams<Traits::kHeadDim> params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = warp_group_index();
  if (threadIdx.x == 0) init_shared<Traits, kUnseenKeys>(shared);
  fill_ones<Traits>(shared);
  __syncthreads();
  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) produce_keys<Traits>(params, shared);
    if (warp == 1) produce_values<Traits, kUnseenKeys>(params, shared);
    if (warp == 2) produce_queries<Traits>(params, shared);
    if (kUnseenKeys && warp == 3) clear_values<Traits>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits, kUnseenKeys>(params, shared, warp_group - 1).consume_rows();
  }
}

}  // namespace rrattn::cuda::sm90::quantized_attend
