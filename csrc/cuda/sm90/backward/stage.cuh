// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/backward/finish_grad_sink.cuh"
#include "../../common/backward/prepare.cuh"
#include "../../common/element.cuh"
#include "../../common/rows.cuh"
#include "finish_grad_query.cuh"
#include "kernel.cuh"
#include "stage.h"
#include "wide/kernel.cuh"

namespace rrattn::cuda::sm90::backward {

// Bytes of the queries, dO and sums of dQ of a section. At short lengths that is several key heads,
// so that the thread blocks are done at about the same time: see docs/tuning.md.
constexpr int64_t kSectionBytes = 64 << 20;

template <typename Traits>
KernelParams kernel_params(const BackwardParams& backward, const Workspace& workspace,
                           const PackedRows& packed) {
  const Visibility& visibility = backward.visibility;
  const cudaStream_t stream = stream_of(backward.execution);
  const int64_t key_heads = visibility.batch * backward.heads.num_heads_k;
  const auto map = [&](const Rows& rows, const TensorShape& shape, void* copy, int box_rows) {
    return map_rows(rows, shape, copy, box_rows, stream);
  };
  const Heads& heads = backward.heads;
  const int64_t row_bytes =
      (Traits::kHeadDim + Traits::kHeadDimV) * sizeof(typename Traits::Element) +
      Traits::kHeadDim * sizeof(float);
  const int64_t head_bytes =
      num_padded_rows(visibility) / std::max<int64_t>(1, key_heads) * row_bytes;
  return {backward,
          map(backward.query, query_shape_of(visibility, heads), packed.query, kQueryTile),
          map(backward.key, key_shape_of(visibility, heads), packed.key, Traits::kKeys),
          map(backward.value, value_shape_of(visibility, heads), packed.value, Traits::kKeys),
          map(backward.grad_out, out_shape_of(visibility, heads), packed.grad_out, kQueryTile),
          workspace,
          static_cast<int>(key_heads * visibility.num_n_blocks() * (kBlockSize / Traits::kKeys)),
          heads_in_section(kSectionBytes, head_bytes, key_heads),
          aligned_rows(backward.grad_key),
          aligned_rows(backward.grad_value),
          aligned_rows(backward.grad_query)};
}

template <typename Traits>
void launch_finish_grad_query(const KernelParams& params) {
  const BackwardParams& backward = params.backward;
  const auto grid = static_cast<unsigned>(num_padded_rows(backward.visibility) / kQueryTile);
  if (grid == 0) return;
  finish_grad_query_kernel<Traits>
      <<<grid, kConsumerThreads, 0, stream_of(backward.execution)>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>::workspace_bytes(
    const BackwardParams& params) {
  Arena arena;
  Workspace(arena, params, kHeadDim);
  PackedRows(arena, params);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
void Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>::launch(const BackwardParams& backward) {
  constexpr bool kWide = kHeadDim > 128;
  using Traits = std::conditional_t<
      kWide, wide::KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV, kDeterministic>,
      KernelTraits<ElementOf<kDataType>, kDeterministic>>;
  const cudaStream_t stream = stream_of(backward.execution);
  Arena arena(backward.execution.workspace);
  const Workspace workspace(arena, backward, kHeadDim);
  const auto params = kernel_params<Traits>(backward, workspace, PackedRows(arena, backward));
  cuda::backward::prepare<typename Traits::Element, kHeadDim>(backward, workspace);
  if (params.num_items > 0) {
    if constexpr (kWide) {
      launch_persistent<Traits>(wide::backward_kernel<Traits>, params.num_items, stream, params);
    } else {
      launch_persistent<Traits>(backward_kernel<Traits>, params.num_items, stream, params);
    }
  }
  launch_finish_grad_query<Traits>(params);
  cuda::backward::finish_grad_sink(backward, workspace);
}

}  // namespace rrattn::cuda::sm90::backward
