// From the sums of dQ to grad_query.
#pragma once

#include "../../common/store_row.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

// A thread block takes one tile of the sums, in the order of the accumulators of the consumers, or the
// consumer, that computed it.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kGradQueryThreads)
    finish_grad_query_kernel(const __grid_constant__ KernelParams params) {
  using Element = typename Traits::Element;
  constexpr int kThreads = Traits::kGradQueryThreads;
  constexpr int kValues = kQueryTile * Traits::kHeadDim / kThreads;
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int64_t tiles = visibility.num_m_blocks() * kQueryTiles;
  const int64_t head = blockIdx.x / tiles % visibility.num_heads;
  const int64_t batch = blockIdx.x / tiles / visibility.num_heads;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kQueryTile;
  const uint32_t* from =
      params.workspace.grad_query + first_row * Traits::kHeadDim + threadIdx.x * 4;
  auto sums = make_tensor<float>(Shape<Int<kValues>>{});
  const int* states = params.workspace.sums_state;
  if (states == nullptr || states[first_row / params.workspace.sums_rows] != kNoSums) {
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i * kThreads);
      sums(i) = four.x, sums(i + 1) = four.y, sums(i + 2) = four.z, sums(i + 3) = four.w;
    }
  } else {
    clear(sums);
  }
  // Of two consumers each has half of the columns.
  const int first_column =
      static_cast<int>(threadIdx.x) / kWarpGroup * (Traits::kHeadDim * kWarpGroup / kThreads);
  const int row_in_tile =
      static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  if constexpr (Traits::kDeterministic) {
    const int64_t key_head =
        batch * backward.heads.num_heads_k + head / group_size(visibility, backward.heads);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float query_scale =
          params.workspace.query_scale[first_row + row_in_tile + i % 4 / 2 * 8];
      const float key_scale =
          params.workspace.key_scale[key_head * Traits::kHeadDim + first_column + i / 4 * 8 +
                                     threadIdx.x % 4 * 2 + i % 2];
      sums(i) = static_cast<float>(__float_as_int(sums(i))) / query_scale / key_scale;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = blockIdx.x % tiles * kQueryTile + row_in_tile + half * 8;
    Element* row = static_cast<Element*>(backward.grad_query.data) +
                   batch * backward.grad_query.batch_stride +
                   head * backward.grad_query.head_stride + token * backward.grad_query.row_stride;
    store_row(sums, half, backward.softmax_scale, row + first_column, token < visibility.seqlen_q,
              static_cast<int>(backward.heads.head_dim) - first_column, params.aligned_grad_query);
  }
}

}  // namespace rrattn::cuda::sm90::backward
