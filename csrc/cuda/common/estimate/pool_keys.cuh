// Averages the keys of each stride, and writes tiles of the averages as shared memory is to hold
// them; with spread, finds the variances too. A NaN or infinity in a key that no query sees counts
// as zero, and so do the keys that the last stride lacks.
//
// Tile says what a tile is: the type and padded size of its keys (Element, kHeadDim), how many
// strides, elements and variances it has (kStrides, kElements, kVariances), and where in it eight
// columns of an average and a variance lie (key_offset, variance_offset). Workspace has the tiles
// (pooled_keys, variances), and counters that the next kernel wants at zero (clear_counters). Both are
// types of a path, so no two paths have an instance of the kernel in common. For a ragged batch it tells
// itself with the tiles from one on (from_tile).
#pragma once

#include "../ragged_plan.cuh"
#include "../rows.cuh"
#include "items.cuh"

namespace rrattn::cuda::estimate {

constexpr int kPoolThreads = 256;
constexpr int kPoolStrides = 32;  // strides of a thread block

__device__ inline bool all_finite(const float (&values)[8]) {
  bool finite = true;
#pragma unroll
  for (const float value : values) finite &= isfinite(value);
  return finite;
}

// The moments of 8 columns of a stride. Squares are of the differences to its first key, which are
// not much larger than those to the mean.
struct Moments {
  float sum[8] = {}, first[8], difference_sum[8] = {}, squares[8] = {};

  __device__ void add(int e, float value, bool is_first) {
    if (is_first) first[e] = value;
    sum[e] += value;
    const float difference = value - first[e];
    difference_sum[e] += difference;
    squares[e] = fmaf(difference, difference, squares[e]);
  }

  // The sum of the columns' variances, times the `count` of keys.
  __device__ float variance(float count) const {
    float total = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      total += fmaxf(squares[e] - difference_sum[e] * difference_sum[e] / count, 0);
    }
    return total;
  }
};

// Averages kPoolStrides strides from first_stride on, all by one thread block. A thread averages 8
// columns of one stride, with up to 8 loads in flight. rows_of(key) tells where rows are counted from,
// key 0, for the stride of this key.
template <typename Tile, int kKeyStride, bool kFlashMask, typename Workspace, typename RowsOf>
__device__ __forceinline__ void pool_strides(const EstimateParams& params, const WorkLayout& layout,
                                             const Workspace& workspace, bool aligned,
                                             int64_t first_stride, int64_t head, int64_t batch,
                                             const RowsOf& rows_of) {
  using Element = typename Tile::Element;
  constexpr int kChunks = Tile::kHeadDim / 8;
  constexpr int kLoads = kKeyStride < 8 ? kKeyStride : 8;
  const int head_dim = static_cast<int>(params.heads.head_dim);
  const int64_t group = group_size(params.visibility, params.heads);
  for (int i = threadIdx.x; i < kPoolStrides * kChunks; i += kPoolThreads) {
    const int64_t stride = first_stride + i / kChunks;
    const int column = i % kChunks * 8;
    const Element* keys = rows_of(stride * kKeyStride);
    Moments moments;
#pragma unroll 1
    for (int64_t key = stride * kKeyStride; key < (stride + 1) * kKeyStride; key += kLoads) {
      uint4 rows[kLoads];
#pragma unroll
      for (int r = 0; r < kLoads; ++r) {
        rows[r] = make_uint4(0, 0, 0, 0);
        if (key + r < params.visibility.seqlen_k) {
          rows[r] = load_eight(keys + (key + r) * params.key.row_stride, column, head_dim, aligned);
        }
      }
#pragma unroll
      for (int r = 0; r < kLoads; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          moments.add(e, element<Element>(rows[r], e), key + r == stride * kKeyStride);
        }
      }
    }
    if (kFlashMask && !all_finite(moments.sum)) {
      moments = {};
#pragma unroll 1
      for (int64_t key = stride * kKeyStride; key < (stride + 1) * kKeyStride; ++key) {
        const bool exists = key < params.visibility.seqlen_k;
        const bool seen = exists && seen_by_group(params.visibility, group, batch, head, key);
        uint4 row = make_uint4(0, 0, 0, 0);
        if (exists) {
          row = load_eight(keys + key * params.key.row_stride, column, head_dim, aligned);
        }
        for (int e = 0; e < 8; ++e) {
          const float value = element<Element>(row, e);
          moments.add(e, seen || isfinite(value) ? value : 0, key == stride * kKeyStride);
        }
      }
    }
    alignas(16) Element mean[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) mean[e] = static_cast<Element>(moments.sum[e] / kKeyStride);
    const int64_t tile =
        (batch * params.heads.num_heads_k + head) * layout.num_tiles + stride / Tile::kStrides;
    const int offset = Tile::key_offset(static_cast<int>(stride % Tile::kStrides), column);
    *reinterpret_cast<uint4*>(workspace.pooled_keys + tile * Tile::kElements + offset) =
        *reinterpret_cast<const uint4*>(mean);
    if (params.sampling.spread > 0) {
      const float variance = row_sum<kChunks>(moments.variance(kKeyStride));
      if (i % kChunks == 0) {
        const auto in_tile = static_cast<int>(stride % Tile::kStrides);
        workspace.variances[tile * Tile::kVariances + Tile::variance_offset(in_tile)] =
            variance / static_cast<float>(kKeyStride * head_dim);
      }
    }
  }
}

template <typename Tile, int kKeyStride, bool kFlashMask, typename Workspace>
__global__ void __launch_bounds__(kPoolThreads)
    pool_keys_kernel(EstimateParams params, WorkLayout layout, Workspace workspace, bool aligned) {
  using Element = typename Tile::Element;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  if (blockIdx.x == 0 && head == 0 && batch == 0 && threadIdx.x == 0) {
    workspace.clear_counters();
  }
  const auto* keys = static_cast<const Element*>(params.key.data) +
                     batch * params.key.batch_stride + head * params.key.head_stride;
  pool_strides<Tile, kKeyStride, kFlashMask>(params, layout, workspace, aligned,
                                             static_cast<int64_t>(blockIdx.x) * kPoolStrides, head,
                                             batch, [&](int64_t) { return keys; });
}

// The same for the requests of a ragged batch. Thread blocks go through the tiles of all, as many at a
// time as there are.
template <typename Tile, int kKeyStride, typename Workspace>
__global__ void __launch_bounds__(kPoolThreads)
    pool_ragged_keys_kernel(const __grid_constant__ RaggedPlan plan,
                            const __grid_constant__ Workspace workspace, int num_heads_k,
                            bool aligned) {
  using Element = typename Tile::Element;
  constexpr int kParts = Tile::kStrides / kPoolStrides;
  if (blockIdx.x == 0 && threadIdx.x == 0) workspace.clear_counters();
  const int num_parts = plan.num_tiles() * kParts;
  for (int at = blockIdx.x; at < num_parts * num_heads_k; at += gridDim.x) {
    const int part = at % num_parts, head = at / num_parts;
    const int request = request_of(plan.first_tiles, plan.num_requests, part / kParts);
    const RaggedEstimate& estimate = plan.estimate[request];
    const EstimateParams& params = estimate.call.params;
    const int first_tile = plan.first_tiles[request];
    const auto* keys = static_cast<const Element*>(params.key.data) + head * params.key.head_stride;
    pool_strides<Tile, kKeyStride, false>(
        params, estimate.layout, workspace.from_tile(first_tile * num_heads_k), aligned,
        int64_t{part - first_tile * kParts} * kPoolStrides, head, 0, [&](int64_t key) {
          return key < params.visibility.seqlen_k
                     ? keys + estimate.call.pages.offset(params.key, key)
                     : keys;
        });
  }
}

template <typename Tile, int kKeyStride, typename Workspace>
void launch_pool_keys(const EstimateParams& params, const WorkLayout& layout,
                      const Workspace& workspace) {
  const dim3 grid(static_cast<unsigned>(layout.num_tiles * Tile::kStrides / kPoolStrides),
                  static_cast<unsigned>(params.heads.num_heads_k),
                  static_cast<unsigned>(params.visibility.batch));
  const auto kernel = params.visibility.row_bounds.data
                          ? pool_keys_kernel<Tile, kKeyStride, true, Workspace>
                          : pool_keys_kernel<Tile, kKeyStride, false, Workspace>;
  kernel<<<grid, kPoolThreads, 0, stream_of(params.execution)>>>(params, layout, workspace,
                                                                 aligned_rows(params.key));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <typename Tile, int kKeyStride, typename Workspace>
void launch_pool_ragged_keys(const RaggedParams& batch, const RaggedPlan& plan,
                             const Workspace& workspace) {
  constexpr int kThreadBlocks = 8;  // of a multiprocessor
  const auto num_heads_k = static_cast<int>(batch.estimate.heads.num_heads_k);
  pool_ragged_keys_kernel<Tile, kKeyStride, Workspace>
      <<<num_multiprocessors() * kThreadBlocks, kPoolThreads, 0, stream_of(batch.execution)>>>(
          plan, workspace, num_heads_k, aligned_rows(batch.estimate.key));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::estimate
