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
  params.num_items =
      static_cast<int>(visibility.batch * visibility.num_heads * visibility.num_m_blocks());
  // Keys and values of a section stay well below the L2 cache.
  const int64_t section_bytes = int64_t{device_attribute(cudaDevAttrL2CacheSize)} * 5 / 8;
  params.section_heads = attend_section_heads(attend, section_bytes);
  params.aligned_query = aligned_rows(attend.query);
  params.aligned_key = aligned_rows(attend.key);
  params.aligned_value = aligned_rows(attend.value);
  params.aligned_out = aligned_rows(attend.out);

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

}  // namespace rrattn::cuda::sm80::attend

// The stage for all tile tables.
#define RRATTN_INSTANTIATE_ATTEND(kDataType, kHeadDim, kHeadDimV)                           \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k99KB>;  \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k163KB>; \
  template struct rrattn::cuda::sm80::attend::Stage<kDataType, kHeadDim, kHeadDimV,         \
                                                    rrattn::cuda::sm80::TileTable::k227KB>
