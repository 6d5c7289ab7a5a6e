// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/attend_sections.cuh"
#include "../../common/block_means.cuh"
#include "../../common/element.cuh"
#include "../../common/stood_in_for.cuh"
#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::sm80::attend {

template <DataType kDataType, int kHeadDim, int kHeadDimV, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kTable>::workspace_bytes(const AttendParams& params) {
  Arena arena;
  Workspace(arena, params);
  return arena.used();
}

// Sets what does not depend on the rows.
inline void set_launch(KernelParams& params, int section_heads) {
  params.section_heads = section_heads;
  params.aligned_query = aligned_rows(params.attend.query);
  params.aligned_key = aligned_rows(params.attend.key);
  params.aligned_value = aligned_rows(params.attend.value);
  params.aligned_out = aligned_rows(params.attend.out);
}

// Keys and values of a section stay well below the L2 cache.
inline int section_heads_of(const AttendParams& attend) {
  return attend_section_heads(attend, int64_t{device_attribute(cudaDevAttrL2CacheSize)} * 5 / 8);
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, TileTable kTable>
void Stage<kDataType, kHeadDim, kHeadDimV, kTable>::launch(const AttendParams& attend) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV, kTable>;
  const cudaStream_t stream = stream_of(attend.execution);
  const Visibility& visibility = attend.visibility;
  if (visibility.batch * visibility.num_heads * visibility.seqlen_q == 0) return;
  Arena arena(attend.execution.workspace);
  KernelParams params{attend, Workspace(arena, attend)};
  const Workspace& workspace = params.workspace;
  compute_span_bounds(visibility, kBlockSize, workspace.block_bounds, stream);
  params.num_items = static_cast<int>(visibility.num_mask_rows());
  set_launch(params, section_heads_of(attend));
  workspace.order.find(attend, params.section_heads);

  const auto run = [&](auto kernel) {
    launch_kernel<Traits>(kernel, params.num_items, stream, params);
  };
  if (attend.compensate) {
    constexpr int kMeanColumns = kHeadDim <= 128 ? kHeadDim : 256;  // a power of 2
    launch_block_means<typename Traits::Element, kMeanColumns>(attend, workspace.mean_key,
                                                               workspace.mean_value, stream);
    find_stood_in_for(attend, workspace.block_bounds, workspace.stood_in_for, stream);
    params.added_to_means = added_to_means(attend);
    run(attend_kernel<Traits, true, true>);
  } else if (may_leave_unseen_keys(visibility)) {
    run(attend_kernel<Traits, true, false>);
  } else {
    run(attend_kernel<Traits, false, false>);
  }
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kTable>::ragged_workspace_bytes(const RaggedParams&,
                                                                              const RaggedPlan&) {
  return 0;
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, TileTable kTable>
void Stage<kDataType, kHeadDim, kHeadDimV, kTable>::launch_ragged(const RaggedParams& batch,
                                                                  const RaggedPlan& plan, void*) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV, kTable>;
  Arena arena;
  KernelParams params{batch.attend, Workspace(arena, batch.attend)};  // of which it takes nothing
  set_launch(params, section_heads_of(longest_call(batch)));
  const auto num_heads = static_cast<int>(batch.attend.visibility.num_heads);
  launch_kernel<Traits>(ragged_attend_kernel<Traits>, plan.max_row_blocks * num_heads,
                        stream_of(batch.execution), params, plan);
}

}  // namespace rrattn::cuda::sm80::attend

// The stage for all tile tables.
#define RRATTN_INSTANTIATE_ATTEND(kDataType, kHeadDim, kHeadDimV)                           \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k99KB>;  \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k163KB>; \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k227KB>
