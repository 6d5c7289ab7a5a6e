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
  params.query = map_rows(attend.query, query_shape, workspace.query, kConsumerRows, stream,
                          Traits::kPanelColumns);
  params.key =
      map_rows(attend.key, key_shape, workspace.key, Traits::kTileN, stream, Traits::kPanelColumns);
  params.value = map_rows(attend.value, value_shape, workspace.value, Traits::kTileN, stream,
                          Traits::kPanelColumns);
  params.block_bounds = workspace.block_bounds;
  params.next_item = workspace.next_item;
  params.num_items = static_cast<int>(visibility.num_mask_rows());
  params.section_heads = attend_section_heads(attend, kSectionBytes);
  params.places = workspace.order.places;
  params.aligned_out = aligned_rows(attend.out);
  workspace.order.find(attend, params.section_heads);

  if (attend.compensate) {
    constexpr int kMeanColumns =  // a power of 2
        kHeadDim <= 64    ? 64
        : kHeadDim <= 128 ? 128
                          : 256;
    launch_block_means<typename Traits::Element, kMeanColumns>(attend, workspace.mean_key,
                                                               workspace.mean_value, stream);
    find_stood_in_for(attend, workspace.block_bounds, workspace.stood_in_for, stream);
    params.stood_in_for = workspace.stood_in_for;
    const auto map_means = [&](const Rows& means, const TensorShape& shape) {
      return map_rows(means, Workspace::means_of(shape), nullptr, Traits::kTileN, stream,
                      Traits::kPanelColumns);
    };
    params.mean_key = map_means(workspace.mean_key, key_shape);
    params.mean_value = map_means(workspace.mean_value, value_shape);
    params.added_to_means = added_to_means(attend);
    launch_persistent<Traits>(attend_kernel<Traits, true, true, KernelParams>, params.num_items,
                              stream, params);
    return;
  }
  const auto kernel = may_leave_unseen_keys(visibility)
                          ? attend_kernel<Traits, true, false, KernelParams>
                          : attend_kernel<Traits, false, false, KernelParams>;
  launch_persistent<Traits>(kernel, params.num_items, stream, params);
}

// A ragged batch's rows as the copies know them: queries, and keys and values, of one request after the
// other, or in pages, each as a batch entry.
struct RaggedRows {
  TensorShape query_shape, key_shape, value_shape;
  void *query, *key, *value;  // copies of what no tensor map can describe; else empty
  int* next_item;

  RaggedRows(Arena& arena, const RaggedParams& batch)
      : query_shape(query_shape_of(batch.attend.visibility, batch.attend.heads)),
        key_shape(key_shape_of(batch.attend.visibility, batch.attend.heads)),
        value_shape(value_shape_of(batch.attend.visibility, batch.attend.heads)) {
    if (batch.block_tables != nullptr) key_shape.batch = value_shape.batch = batch.num_pages;
    query = arena.take<uint16_t>(elements_to_pack(batch.attend.query, query_shape));
    key = arena.take<uint16_t>(elements_to_pack(batch.attend.key, key_shape));
    value = arena.take<uint16_t>(elements_to_pack(batch.attend.value, value_shape));
    next_item = arena.take<int>(1);
  }
};

template <DataType kDataType, int kHeadDim, int kHeadDimV>
int64_t Stage<kDataType, kHeadDim, kHeadDimV>::ragged_workspace_bytes(const RaggedParams& batch,
                                                                      const RaggedPlan&) {
  Arena arena;
  RaggedRows(arena, batch);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV>
void Stage<kDataType, kHeadDim, kHeadDimV>::launch_ragged(const RaggedParams& batch,
                                                          const RaggedPlan& plan, void* workspace) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV>;
  const cudaStream_t stream = stream_of(batch.execution);
  const AttendParams& attend = batch.attend;
  Arena arena(workspace);
  const RaggedRows rows(arena, batch);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(rows.next_item, 0, sizeof(int), stream));
  RaggedKernelParams params{};
  params.attend = attend;
  params.box_rows = Traits::kTileN;
  if (batch.block_tables != nullptr) {
    params.block_tables = batch.block_tables;
    params.table_width = static_cast<int>(batch.table_width);
    params.page_size = cutlass::FastDivmod(static_cast<int>(batch.page_size));
    params.box_rows = std::min(params.box_rows, static_cast<int>(batch.page_size));
  }
  params.query = map_rows(attend.query, rows.query_shape, rows.query, kConsumerRows, stream,
                          Traits::kPanelColumns);
  params.key = map_rows(attend.key, rows.key_shape, rows.key, params.box_rows, stream,
                        Traits::kPanelColumns);
  params.value = map_rows(attend.value, rows.value_shape, rows.value, params.box_rows, stream,
                          Traits::kPanelColumns);
  params.next_item = rows.next_item;
  params.section_heads = attend_section_heads(longest_call(batch), kSectionBytes);
  params.aligned_out = aligned_rows(attend.out);
  params.plan = plan;
  params.cu_seqlens_q = batch.cu_seqlens_q;
  const int max_items = plan.max_row_blocks * static_cast<int>(attend.visibility.num_heads);
  launch_persistent<Traits>(attend_kernel<Traits, true, false, RaggedKernelParams>, max_items,
                            stream, params);
}

}  // namespace rrattn::cuda::sm90::attend
