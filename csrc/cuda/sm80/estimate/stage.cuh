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
