// Block scores on every GPU from Ampere on.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D]  ->  block_scores [B, Hq, Mq, Mk] float32
//
// pool_keys_kernel averages the keys of each stride and writes them as the tensor cores want them.
//
// estimate_kernel is persistent. An item is up to two row tiles of 64 sampled queries that share a
// key head. A warp keeps its queries in registers, computes S = Q K^T for one tile of pooled keys
// after the other (mma), takes 2^(S - reference) and sums it over the strides of each key block.
// The reference of a row is its maximum over the first tile in which it sees anything: later tiles need
// no maximum and no rescaling, because a float's exponent has room for scores 2^100 times the
// reference. An item with a row that outgrows even that goes past the keys twice more, for the
// row's exact maximum and for new sums.
//
// The softmax's denominator is known only after the last tile, and it differs from row to row, so
// the sums wait in the workspace until it is. Then all threads divide them by it, add up the rows
// of each query block and write whole rows of block_scores.
#pragma once

#include "key_ring.cuh"
#include "warp_rows.cuh"

namespace rrattn::cuda::sm80::estimate {

// Writes the block scores of the item.
template <typename Traits, int kKeyStride>
__device__ inline void finish(const EstimateParams& params, const Workspace<Traits>& workspace,
                              const typename Traits::SharedStorage& shared) {
  using Sums = BlockSums<kKeyStride>;
  const Visibility& visibility = params.visibility;
  const auto& item = shared.item;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int block_rows = kBlockSize / static_cast<int>(params.sampling.stride);
  for (int first_row = 0; first_row < kItemRows; first_row += block_rows) {
    const RowTile& rows = item.rows[first_row / kTileQueries];
    const int m_block = (rows.first_sample + first_row % kTileQueries) / block_rows;
    if (!rows.active || m_block >= num_m_blocks) continue;
    const int64_t head = static_cast<int64_t>(item.batch) * visibility.num_heads + rows.head;
    float* scores =
        params.block_scores + (head * num_m_blocks + m_block) * static_cast<int64_t>(num_n_blocks);
    for (int n_block = threadIdx.x; n_block < num_n_blocks; n_block += Traits::kThreads) {
      float score = 0;
#pragma unroll
      for (int part = 0; part < Sums::kSumsOfBlock; ++part) {
        const int sum = n_block * Sums::kSumsOfBlock + part;
        const int tile = sum / Sums::kTileSums;
        if (tile >= item.num_tiles ||
            hides<kTileStrides * kKeyStride>(item, params, workspace.tile_bounds, tile)) {
          continue;  // no sum was written
        }
#pragma unroll 16
        for (int r = first_row; r < first_row + block_rows; ++r) {
          score = fmaf(__ldcg(workspace.sums_of(r) + sum), shared.row_factor[r], score);
        }
      }
      scores[n_block] = score;
    }
  }
}

// Computes the item, from its queries to its block scores.
template <typename Traits, int kKeyStride>
__device__ __forceinline__ void compute_item(const EstimateParams& params,
                                             const Workspace<Traits>& workspace,
                                             KeyRing<Traits, kKeyStride>& keys,
                                             WarpRows<Traits, kKeyStride>& rows,
                                             typename Traits::SharedStorage& shared, bool aligned) {
  // Sums alone, unless a row outgrows its reference: then a pass for its maximum, and sums again.
  int num_passes = 1;
  for (int pass = 0; pass < num_passes; ++pass) {
    const bool maximum = pass == 1;
    keys.start();
    if (pass == 0) rows.begin_item(aligned);
    if (!maximum) rows.begin_sums();
    for (; keys.wait(); keys.advance()) rows.take_tile(keys.tile(), keys.slot(), maximum);
    if (!maximum) rows.end_sums();
    // Also waits until all threads have read the last slots.
    if (__syncthreads_or(rows.outgrown()) && pass == 0) num_passes = 3;
  }
  rows.write_factors(shared.row_factor);
  __syncthreads();  // until all factors, and all block sums, are written
  finish<Traits, kKeyStride>(params, workspace, shared);
}

template <typename Traits, int kKeyStride>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kThreadBlocks)
    estimate_kernel(const __grid_constant__ EstimateParams params,
                    const __grid_constant__ WorkLayout layout,
                    const __grid_constant__ Workspace<Traits> workspace, bool aligned) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  KeyRing<Traits, kKeyStride> keys(params, workspace, layout, shared);
  WarpRows<Traits, kKeyStride> rows(params, layout, workspace, shared);
  for (int index = blockIdx.x; index < layout.num_items;) {
    if (threadIdx.x == 0) {
      fill_item<kKeyStride, kTileStrides>(shared.item, params, layout, index);
      shared.next_item = gridDim.x + atomicAdd(workspace.num_taken, 1);
    }
    __syncthreads();
    compute_item(params, workspace, keys, rows, shared, aligned);
    index = shared.next_item;
    __syncthreads();  // until all threads have read the item, its factors and the next one's number
  }
}

// The same for the requests of a ragged batch, the longest items of all first.
template <typename Traits, int kKeyStride>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kThreadBlocks)
    ragged_estimate_kernel(const __grid_constant__ RaggedPlan plan,
                           const __grid_constant__ Workspace<Traits> workspace, int num_heads_k,
                           bool aligned) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int num_items = plan.num_items() * num_heads_k;
  for (int index = blockIdx.x; index < num_items;) {
    const RequestPart part = plan.items[index / num_heads_k];
    const RaggedEstimate& estimate = plan.estimate[part.request];
    const EstimateParams& params = estimate.call.params;
    const WorkLayout& layout = estimate.layout;
    const Workspace<Traits> own =
        workspace.from_tile(static_cast<int64_t>(plan.first_tiles[part.request]) * num_heads_k);
    if (threadIdx.x == 0) {
      fill_item<kKeyStride, kTileStrides>(shared.item, params, layout,
                                          part.index * num_heads_k + index % num_heads_k);
      shared.next_item = gridDim.x + atomicAdd(workspace.num_taken, 1);
    }
    __syncthreads();  // until the item is there
    KeyRing<Traits, kKeyStride> keys(params, own, layout, shared);
    WarpRows<Traits, kKeyStride> rows(params, layout, own, shared);
    compute_item(params, own, keys, rows, shared, aligned);
    index = shared.next_item;
    __syncthreads();  // until all threads have read the item, its factors and the next one's number
  }
}

}  // namespace rrattn::cuda::sm80::estimate
