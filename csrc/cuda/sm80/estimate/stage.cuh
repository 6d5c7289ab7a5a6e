// Defines Stage: the launches of its kernels. They are the same for every kind of GPU, since they
// fit the smallest.
#pragma once

#include "../../common/estimate/pool_keys.cuh"
#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::sm80::estimate {

// Each of them has an item at a time, and memory for its sums.
template <typename Traits>
int num_thread_blocks(const WorkLayout& layout) {
  return std::min(layout.num_items, num_multiprocessors() * Traits::kThreadBlocks);
}

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kKeyStride, kTable>::workspace_bytes(
    const EstimateParams& params) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim>;
  if (params.visibility.num_heads == 0) return 0;
  const WorkLayout layout(params, kTileStrides, kRowTiles);
  Arena arena;
  Workspace<Traits>(arena, params, num_thread_blocks<Traits>(layout),
                    BlockSums<kKeyStride>::kTileSums);
  return arena.used();
}

template <typename Traits, int kKeyStride>
void launch_estimate(const EstimateParams& params) {
  const cudaStream_t stream = stream_of(params.execution);
  const WorkLayout layout(params, kTileStrides, kRowTiles);
  const int thread_blocks = num_thread_blocks<Traits>(layout);
  Arena arena(params.execution.workspace);
  const Workspace<Traits> workspace(arena, params, thread_blocks, BlockSums<kKeyStride>::kTileSums);
  compute_span_bounds(params.visibility, kKeyStride, workspace.stride_bounds, stream);
  compute_span_bounds(params.visibility, kKeyStride * kTileStrides, workspace.tile_bounds, stream);
  launch_pool_keys<typename Traits::Tile, kKeyStride>(params, layout, workspace);
  const auto kernel = estimate_kernel<Traits, kKeyStride>;
  launch_kernel<Traits>(kernel, thread_blocks, stream, params, layout, workspace,
                        aligned_rows(params.query));
}

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
void Stage<kDataType, kHeadDim, kKeyStride, kTable>::launch(const EstimateParams& params) {
  const Visibility& visibility = params.visibility;
  if (visibility.batch == 0 || visibility.num_heads == 0 || visibility.seqlen_q == 0 ||
      visibility.seqlen_k == 0) {
    return;
  }
  launch_estimate<KernelTraits<ElementOf<kDataType>, kHeadDim>, kKeyStride>(params);
}

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
EstimateTiles Stage<kDataType, kHeadDim, kKeyStride, kTable>::ragged_tiles() {
  return {kTileStrides, kRowTiles};
}

// That of a ragged batch, by the most that there may be of everything.
template <typename Traits, int kKeyStride>
Workspace<Traits> ragged_workspace(Arena& arena, const RaggedParams& batch,
                                   const RaggedPlan& plan) {
  const int64_t max_tiles = ceil_div(batch.max_seqlen_k, kKeyStride * kTileStrides);
  return Workspace<Traits>(arena, batch.estimate, num_multiprocessors() * Traits::kThreadBlocks,
                           BlockSums<kKeyStride>::kTileSums,
                           plan.max_tiles * batch.estimate.heads.num_heads_k,
                           static_cast<int>(max_tiles));
}

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kKeyStride, kTable>::ragged_workspace_bytes(
    const RaggedParams& batch, const RaggedPlan& plan) {
  Arena arena;
  ragged_workspace<KernelTraits<ElementOf<kDataType>, kHeadDim>, kKeyStride>(arena, batch, plan);
  return arena.used();
}

template <typename Traits, int kKeyStride>
void launch_ragged_estimate(const RaggedParams& batch, const RaggedPlan& plan,
                            void* workspace_memory) {
  Arena arena(workspace_memory);
  const auto workspace = ragged_workspace<Traits, kKeyStride>(arena, batch, plan);
  launch_pool_ragged_keys<typename Traits::Tile, kKeyStride>(batch, plan, workspace);
  const auto num_heads_k = static_cast<int>(batch.estimate.heads.num_heads_k);
  launch_kernel<Traits>(ragged_estimate_kernel<Traits, kKeyStride>,
                        num_multiprocessors() * Traits::kThreadBlocks, stream_of(batch.execution),
                        plan, workspace, num_heads_k, aligned_rows(batch.estimate.query));
}

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
void Stage<kDataType, kHeadDim, kKeyStride, kTable>::launch_ragged(const RaggedParams& batch,
                                                                   const RaggedPlan& plan,
                                                                   void* workspace) {
  launch_ragged_estimate<KernelTraits<ElementOf<kDataType>, kHeadDim>, kKeyStride>(batch, plan,
                                                                                   workspace);
}

}  // namespace rrattn::cuda::sm80::estimate

#define RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, kKeyStride)               \
  template struct rrattn::cuda::sm80::estimate::Stage<kDataType, kHeadDim, kKeyStride,        \
                                                      rrattn::cuda::sm80::TileTable::k99KB>;  \
  template struct rrattn::cuda::sm80::estimate::Stage<kDataType, kHeadDim, kKeyStride,        \
                                                      rrattn::cuda::sm80::TileTable::k163KB>; \
  template struct rrattn::cuda::sm80::estimate::Stage<kDataType, kHeadDim, kKeyStride,        \
                                                      rrattn::cuda::sm80::TileTable::k227KB>

// The stage for all strides of keys and kinds of GPU.
#define RRATTN_INSTANTIATE_ESTIMATE(kDataType, kHeadDim)           \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 1);  \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 2);  \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 4);  \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 8);  \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 16); \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 32); \
  RRATTN_INSTANTIATE_ESTIMATE_FOR_TABLES(kDataType, kHeadDim, 64)
