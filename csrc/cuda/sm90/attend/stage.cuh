// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/attend_sections.cuh"
#include "../../common/block_means.cuh"
#include "../../common/element.cuh"
#include "../../common/rows.cuh"
#include "../../common/stood_in_for.cuh"
#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::sm90::attend {

// Bytes of the keys and values of a section: well below the H200's 50 MB of L2. All heads in one
// section are slower at long lengths: see docs/tuning.md.
constexpr int64_t kSectionBytes = 32 << 20;

template <DataType kDataType, int kHeadDim, int kHeadDimV>
int64_t Stage<kDataType, kHeadDim, kHeadDimV>::workspace_bytes(const AttendParams& params) {
  Arena arena;
  Workspace(arena, params);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV>
void Stage<kDataType, kHeadDim, kHeadDimV>::launch(const AttendParams& attend) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV>;
  const cudaStream_t stream = stream_of(attend.execution);
  const Visibility& visibility = attend.visibility;
  if (visibility.batch * visibility.num_heads * visibility.seqlen_q == 0) return;
  Arena arena(attend.execution.workspace);
  const Workspace workspace(arena, attend);
  compute_span_bounds(visibility, kBlockSize, workspace.block_bounds, stream);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_item, 0, sizeof(int), stream));

  KernelParams params;
  params.attend = attend;
  const TensorShape query_shape = query_shape_of(visibility, attend.heads);
  const TensorShape key_shape = key_shape_of(visibility, attend.heads);
  const TensorShape value_shape = value_shape_of(visibility, attend.heads);
  params.query = map_rows(attend.query, query_shape, workspace.query, kConsumerRows, stream);
  params.key = map_rows(attend.key, key_shape, workspace.key, Traits::kTileN, stream);
  params.value = map_rows(attend.value, value_shape, workspace.value, Traits::kTileN, stream);
  params.block_bounds = workspace.block_bounds;
  params.next_item = workspace.next_item;
  params.num_items =
      static_cast<int>(visibility.batch * visibility.num_heads * visibility.num_m_blocks());
  params.section_heads = attend_section_heads(attend, kSectionBytes);
  params.aligned_out = aligned_rows(attend.out);

  if (attend.compensate) {
    constexpr int kMeanColumns = kHeadDim <= 128 ? kHeadDim : 256;  // a power of 2
    launch_block_means<typename Traits::Element, kMeanColumns>(attend, workspace.mean_key,
                                                               workspace.mean_value, stream);
    find_stood_in_for(attend, workspace.block_bounds, workspace.stood_in_for, stream);
    params.stood_in_for = workspace.stood_in_for;
    const auto map_means = [&](const Rows& means, const TensorShape& shape) {
      return map_rows(means, Workspace::means_of(shape), nullptr, Traits::kTileN, stream);
    };
    params.mean_key = map_means(workspace.mean_key, key_shape);
    params.mean_value = map_means(workspace.mean_value, value_shape);
    params.added_to_means = added_to_means(attend);
    launch_persistent<Traits>(attend_kernel<Traits, true, true>, params.num_items, stream, params);
    return;
  }
  const auto kernel = may_leave_unseen_keys(visibility) ? attend_kernel<Traits, true, false>
                                                        : attend_kernel<Traits, false, false>;
  launch_persistent<Traits>(kernel, params.num_items, stream, params);
}

}  // namespace rrattn::cuda::sm90::attend
