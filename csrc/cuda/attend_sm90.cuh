// Block-sparse flash attention on Hopper.
//
//   query [B, Lq, Hq, D], key, value [B, Lk, Hkv, D], block_mask [B, Hq, Mq, words]
//     ->  out [B, Lq, Hq, D], lse [B, Hq, Lq]
//
// The kernel is persistent. A thread block takes one row of the block mask at a time: 128 queries
// of a head, 64 for each of two consumer warp groups. Producer warps walk the row's bits and copy
// the queries and the selected tiles of keys and values to shared memory (TMA). Only the producers
// read the mask; they tell the consumers which tiles have hidden scores.
#pragma once

#include "attend_consumer.cuh"
#include "rows.cuh"

namespace rrattn::cuda {

// kUnseenKeys: whether some blocks may hold keys that no row sees. Their values are then zeroed.
template <typename Traits, bool kUnseenKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attend_kernel(const __grid_constant__ AttendKernelParams params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpGroup, 0);
  if (threadIdx.x == 0) {
    constexpr int kConsumers = kConsumerGroups * kWarpGroup;
    constexpr int kConsumerWarps = kConsumers / 32;  // a lane of each arrives
    shared.row_full.init(1);
    shared.row_empty.init(kConsumers + (kUnseenKeys ? 3 : 2) * 32);
    for (int group = 0; group < kConsumerGroups; ++group) {
      shared.query_full[group].init(1);
      shared.query_empty[group].init(kWarpGroup);
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.key_full[stage].init(1);
      shared.key_empty[stage].init(kConsumers);
      shared.value_full[stage].init(1);
      shared.value_uncleared[stage].init(1);
      shared.value_empty[stage].init(kConsumerWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
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
    AttendConsumer<Traits, kUnseenKeys>(params, shared, warp_group - 1).consume_rows();
  }
}

// Bytes of the keys and values of a section: well below the H200's 50 MB of L2. All heads in one
// section are slower at long lengths: see docs/tuning.md.
constexpr int64_t kSectionBytes = 32 << 20;

template <typename Traits>
void launch_attend(const AttendParams& attend) {
  const auto stream = static_cast<cudaStream_t>(attend.execution.stream);
  const Visibility& visibility = attend.visibility;
  const int multiprocessors = num_multiprocessors();
  Arena arena(attend.execution.workspace);
  const AttendWorkspace workspace(arena, attend);
  compute_run_bounds(visibility, kBlockSize, workspace.block_bounds, stream);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_row, 0, sizeof(int), stream));

  AttendKernelParams params;
  params.attend = attend;
  const TensorShape query_shape = query_shape_of(visibility, attend.heads);
  const TensorShape key_shape = key_shape_of(visibility, attend.heads);
  params.query = map_rows(attend.query, query_shape, workspace.query, kGroupRows, stream);
  params.key = map_rows(attend.key, key_shape, workspace.key, Traits::kTileN, stream);
  params.value = map_rows(attend.value, key_shape, workspace.value, Traits::kTileN, stream);
  params.block_bounds = workspace.block_bounds;
  params.next_row = workspace.next_row;
  params.num_rows =
      static_cast<int>(visibility.batch * visibility.num_heads * visibility.num_m_blocks());
  const int64_t head_bytes =
      2 * visibility.seqlen_k * attend.heads.head_dim * size_of(attend.heads.dtype);
  const int64_t key_heads = visibility.batch * attend.heads.num_heads_k;
  params.section_heads = heads_in_section(kSectionBytes, head_bytes, key_heads) *
                         static_cast<int>(visibility.num_heads / attend.heads.num_heads_k);
  params.aligned_out = aligned_rows(attend.out);

  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  const auto kernel = may_leave_unseen_keys(visibility) ? attend_kernel<Traits, true>
                                                        : attend_kernel<Traits, false>;
  RRATTN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<std::min(params.num_rows, multiprocessors), Traits::kThreads, kSharedBytes, stream>>>(
      params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
