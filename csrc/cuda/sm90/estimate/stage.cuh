// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/element.cuh"
#include "../../common/estimate/pool_keys.cuh"
#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::sm90::estimate {

template <DataType kDataType, int kHeadDim, int kKeyStride>
int64_t Stage<kDataType, kHeadDim, kKeyStride>::workspace_bytes(const EstimateParams& params) {
  Arena arena;
  Workspace<KernelTraits<ElementOf<kDataType>, kHeadDim>>(arena, params, num_multiprocessors());
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kKeyStride>
void Stage<kDataType, kHeadDim, kKeyStride>::launch(const EstimateParams& params) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim>;
  const Visibility& visibility = params.visibility;
  if (visibility.batch == 0 || visibility.num_heads == 0 || visibility.seqlen_q == 0 ||
      visibility.seqlen_k == 0) {
    return;
  }
  const cudaStream_t stream = stream_of(params.execution);
  const WorkLayout layout(params, kTileStrides, Traits::kConsumers);
  Arena arena(params.execution.workspace);
  const Workspace<Traits> workspace(arena, params, num_multiprocessors());
  compute_span_bounds(visibility, kKeyStride, workspace.stride_bounds, stream);
  compute_span_bounds(visibility, kKeyStride * kTileStrides, workspace.tile_bounds, stream);
  launch_pool_keys<KeyTile<Traits>, kKeyStride>(params, layout, workspace);
  for (const bool outgrown : {false, true}) {
    launch_persistent<Traits>(estimate_kernel<Traits, kKeyStride, UsualCall>, layout.num_items,
                              stream, params, layout, workspace, outgrown,
                              aligned_rows(params.query), UsualCall{});
  }
}

template <DataType kDataType, int kHeadDim, int kKeyStride>
EstimateTiles Stage<kDataType, kHeadDim, kKeyStride>::ragged_tiles() {
  return {kTileStrides, KernelTraits<ElementOf<kDataType>, kHeadDim>::kConsumers};
}

// That of a ragged batch, by the most that there may be of everything.
template <typename Traits>
Workspace<Traits> ragged_workspace(Arena& arena, const RaggedParams& batch,
                                   const RaggedPlan& plan) {
  const EstimateParams& params = batch.estimate;
  const int64_t max_tiles = ceil_div(batch.max_seqlen_k, params.sampling.key_stride * kTileStrides);
  const int64_t num_heads_k = params.heads.num_heads_k;
  return Workspace<Traits>(arena, params, num_multiprocessors(), plan.max_tiles * num_heads_k,
                           static_cast<int>(max_tiles),
                           plan.max_items * static_cast<int>(num_heads_k));
}

template <DataType kDataType, int kHeadDim, int kKeyStride>
int64_t Stage<kDataType, kHeadDim, kKeyStride>::ragged_workspace_bytes(const RaggedParams& batch,
                                                                       const RaggedPlan& plan) {
  Arena arena;
  ragged_workspace<KernelTraits<ElementOf<kDataType>, kHeadDim>>(arena, batch, plan);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kKeyStride>
void Stage<kDataType, kHeadDim, kKeyStride>::launch_ragged(const RaggedParams& batch,
                                                           const RaggedPlan& plan,
                                                           void* workspace_memory) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim>;
  Arena arena(workspace_memory);
  const auto workspace = ragged_workspace<Traits>(arena, batch, plan);
  launch_pool_ragged_keys<KeyTile<Traits>, kKeyStride>(batch, plan, workspace);
  const WorkLayout common(batch.estimate, kTileStrides, Traits::kConsumers);
  const int max_items = plan.max_items * static_cast<int>(batch.estimate.heads.num_heads_k);
  for (const bool outgrown : {false, true}) {
    launch_persistent<Traits>(estimate_kernel<Traits, kKeyStride, RaggedRequests>, max_items,
                              stream_of(batch.execution), batch.estimate, common, workspace,
                              outgrown, aligned_rows(batch.estimate.query), RaggedRequests{plan});
  }
}

}  // namespace rrattn::cuda::sm90::estimate

// The stage for all strides of keys.
#define RRATTN_INSTANTIATE_ESTIMATE(kDataType, kHeadDim)                        \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 1>;  \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 2>;  \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 4>;  \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 8>;  \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 16>; \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 32>; \
  template struct rrattn::cuda::sm90::estimate::Stage<kDataType, kHeadDim, 64>
