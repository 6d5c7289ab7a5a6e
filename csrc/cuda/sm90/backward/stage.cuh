// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/element.cuh"
#include "bound_keys.cuh"
#include "finish_grad_query.cuh"
#include "finish_grad_sink.cuh"
#include "kernel.cuh"
#include "prepare_rows.cuh"
#include "stage.h"
#include "transpose_mask.cuh"
#include "wide/kernel.cuh"

namespace rrattn::cuda::sm90::backward {

// Bytes of the queries, dO and sums of dQ of a section. At short lengths that is several key heads,
// so that the thread blocks are done at about the same time: see docs/tuning.md.
constexpr int64_t kSectionBytes = 64 << 20;

// Rows of [B, Hq, Mq, kBlockSize], those past the end included.
inline int64_t num_padded_rows(const Visibility& visibility) {
  return visibility.batch * visibility.num_heads * visibility.num_m_blocks() * kBlockSize;
}

template <typename Traits>
KernelParams kernel_params(const BackwardParams& backward, const Workspace& workspace) {
  const Visibility& visibility = backward.visibility;
  const cudaStream_t stream = stream_of(backward.execution);
  const int64_t key_heads = visibility.batch * backward.heads.num_heads_k;
  const auto map = [&](const Rows& rows, const TensorShape& shape, void* packed, int box_rows) {
    return map_rows(rows, shape, packed, box_rows, stream);
  };
  const Heads& heads = backward.heads;
  const int64_t row_bytes =
      (Traits::kHeadDim + Traits::kHeadDimV) * sizeof(typename Traits::Element) +
      Traits::kHeadDim * sizeof(float);
  const int64_t head_bytes =
      num_padded_rows(visibility) / std::max<int64_t>(1, key_heads) * row_bytes;
  return {backward,
          map(backward.query, query_shape_of(visibility, heads), workspace.query, kQueryTile),
          map(backward.key, key_shape_of(visibility, heads), workspace.key, Traits::kKeys),
          map(backward.value, value_shape_of(visibility, heads), workspace.value, Traits::kKeys),
          map(backward.grad_out, out_shape_of(visibility, heads), workspace.grad_out, kQueryTile),
          workspace,
          static_cast<int>(key_heads * visibility.num_n_blocks() * (kBlockSize / Traits::kKeys)),
          heads_in_section(kSectionBytes, head_bytes, key_heads),
          aligned_rows(backward.grad_key),
          aligned_rows(backward.grad_value),
          aligned_rows(backward.grad_query)};
}

// In deterministic mode.
template <typename Traits>
void launch_bound_keys(const KernelParams& params) {
  const BackwardParams& backward = params.backward;
  const cudaStream_t stream = stream_of(backward.execution);
  const int64_t key_heads = backward.visibility.batch * backward.heads.num_heads_k;
  if (key_heads == 0) return;
  RRATTN_CUDA_CHECK(cudaMemsetAsync(params.workspace.key_column, 0,
                                    key_heads * Traits::kHeadDim * sizeof(uint32_t), stream));
  RRATTN_CUDA_CHECK(
      cudaMemsetAsync(params.workspace.value_norm, 0, key_heads * sizeof(uint32_t), stream));
  const dim3 grid(kThreadBlocksPerHead, static_cast<unsigned>(key_heads));
  bound_keys_kernel<typename Traits::Element, Traits::kHeadDim>
      <<<grid, kPrepareThreads, 0, stream>>>(
          params, aligned_rows(backward.key) && aligned_rows(backward.value));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <typename Traits>
void launch_prepare_rows(const KernelParams& params) {
  const BackwardParams& backward = params.backward;
  const auto grid = static_cast<unsigned>(
      ceil_div(num_padded_rows(backward.visibility), kPrepareRows<Traits::kHeadDim>));
  if (grid == 0) return;
  prepare_rows_kernel<typename Traits::Element, Traits::kHeadDim>
      <<<grid, kPrepareThreads, 0, stream_of(backward.execution)>>>(
          params, aligned_rows(backward.out) && aligned_rows(backward.grad_out));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

inline void launch_transpose_mask(const KernelParams& params) {
  const Visibility& visibility = params.backward.visibility;
  const int64_t warps = visibility.batch * visibility.num_heads *
                        ceil_div(visibility.num_m_blocks(), kMaskWordBits) *
                        visibility.num_mask_words();
  if (warps == 0) return;
  const auto grid = static_cast<unsigned>(ceil_div(warps * 32, kPrepareThreads));
  transpose_mask_kernel<<<grid, kPrepareThreads, 0, stream_of(params.backward.execution)>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
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

inline void launch_finish_grad_sink(const KernelParams& params) {
  const BackwardParams& backward = params.backward;
  const auto grid = static_cast<unsigned>(backward.visibility.num_heads);
  if (backward.sink == nullptr || grid == 0) return;
  finish_grad_sink_kernel<<<grid, kSinkThreads, 0, stream_of(backward.execution)>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>::workspace_bytes(
    const BackwardParams& params) {
  Arena arena;
  Workspace(arena, params, kHeadDim);
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
  compute_span_bounds(backward.visibility, kBlockSize, workspace.block_bounds, stream);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_item, 0, sizeof(int), stream));
  const auto params = kernel_params<Traits>(backward, workspace);

  if constexpr (kDeterministic) launch_bound_keys<Traits>(params);
  launch_prepare_rows<Traits>(params);
  if (params.num_items > 0) {
    launch_transpose_mask(params);
    if constexpr (kWide) {
      launch_persistent<Traits>(wide::backward_kernel<Traits>, params.num_items, stream, params);
    } else {
      launch_persistent<Traits>(backward_kernel<Traits>, params.num_items, stream, params);
    }
  }
  launch_finish_grad_query<Traits>(params);
  launch_finish_grad_sink(params);
}

}  // namespace rrattn::cuda::sm90::backward
