// From the sums of dQ to grad_query.
#pragma once

#include "../../common/store_row.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm80::backward {

// A thread block takes the sums of a tile of queries, in the order of the accumulators.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    finish_grad_query_kernel(const __grid_constant__ KernelParams params) {
  using Element = typename Traits::Element;
  using Part = typename Traits::GradQueryPart;
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Traits::kQueries;
  const int64_t padded = visibility.num_m_blocks() * kBlockSize;
  const int64_t head = first_row / padded % visibility.num_heads;
  const int64_t batch = first_row / padded / visibility.num_heads;
  const uint32_t* from = params.workspace.grad_query + first_row * Traits::kHeadDim + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < Part::kFragments; ++m) {
    RowSums<Part::kColumns> sums;
    const int tile_row = Part::first_row() + m * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < cute::size(sums); ++i) {
      const uint32_t bits = from[(m * cute::size(sums) + i) * Traits::kThreads];
      if constexpr (Traits::kDeterministic) {
        const int64_t key_head =
            batch * backward.heads.num_heads_k + head / group_size(visibility, backward.heads);
        const int column = Part::first_column() + i / 4 * 8 + lane % 4 * 2 + i % 2;
        sums(i) = static_cast<float>(static_cast<int>(bits)) /
                  params.workspace.query_scale[first_row + tile_row + i % 4 / 2 * 8] /
                  params.workspace.key_scale[key_head * Traits::kHeadDim + column];
      } else {
        sums(i) = __uint_as_float(bits);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_row % padded + tile_row + half * 8;
      Element* row = static_cast<Element*>(backward.grad_query.data) +
                     batch * backward.grad_query.batch_stride +
                     head * backward.grad_query.head_stride +
                     token * backward.grad_query.row_stride;
      store_row(sums, half, backward.softmax_scale, row + Part::first_column(),
                token < visibility.seqlen_q,
                static_cast<int>(backward.heads.head_dim) - Part::first_column(),
                params.aligned_grad_query);
    }
  }
}

}  // namespace rrattn::cuda::sm80::backward
