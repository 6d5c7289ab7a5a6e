// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/backward/finish_grad_sink.cuh"
#include "../../common/backward/prepare.cuh"
#include "../../common/element.cuh"
#include "../../common/rows.cuh"
#include "finish_grad_query.cuh"
#include "kernel.cuh"
#include "merge_parts.cuh"
#include "stage.h"
#include "wide/kernel.cuh"

namespace rrattn::cuda::sm90::backward {

// Bytes of the queries, dO and sums of dQ of a part of a walk. See docs/tuning.md.
constexpr int64_t kPartBytes = 32 << 20;

template <typename Traits>
WorkOrder work_order(const BackwardParams& params) {
  return cuda::backward::choose_work_order<Traits>(params, kPartBytes).order;
}

template <typename Traits>
KernelParams kernel_params(const BackwardParams& backward, const Workspace& workspace,
                           const PackedRows& packed, const WorkOrder& order,
                           const KeySums& key_sums, const MergedParts& merged) {
  const Visibility& visibility = backward.visibility;
  const cudaStream_t stream = stream_of(backward.execution);
  const auto map = [&](const Rows& rows, const TensorShape& shape, void* copy, int box_rows) {
    return map_rows(rows, shape, copy, box_rows, stream);
  };
  const Heads& heads = backward.heads;
  return {backward,
          map(backward.query, query_shape_of(visibility, heads), packed.query, kQueryTile),
          map(backward.key, key_shape_of(visibility, heads), packed.key, Traits::kKeys),
          map(backward.value, value_shape_of(visibility, heads), packed.value, Traits::kKeys),
          map(backward.grad_out, out_shape_of(visibility, heads), packed.grad_out, kQueryTile),
          workspace,
          key_sums,
          merged.items,
          merged.num_items,
          order,
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
      <<<grid, Traits::kGradQueryThreads, 0, stream_of(backward.execution)>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
using TraitsOf = std::conditional_t<
    (kHeadDim > 128), wide::KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV, kDeterministic>,
    std::conditional_t<(kHeadDim > 64),
                       KernelTraits<ElementOf<kDataType>, kHeadDim, kDeterministic>,
                       narrow::KernelTraits<ElementOf<kDataType>, kDeterministic>>>;

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>::workspace_bytes(
    const BackwardParams& params) {
  using Traits = TraitsOf<kDataType, kHeadDim, kHeadDimV, kDeterministic>;
  Arena arena;
  Workspace(arena, params, Traits::kHeadDim, Traits::kSumsRows);
  PackedRows(arena, params);
  const auto order = work_order<Traits>(params);
  KeySums::take<Traits>(arena, order, kConsumers);
  MergedParts(arena, order);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
void Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>::launch(const BackwardParams& backward) {
  using Traits = TraitsOf<kDataType, kHeadDim, kHeadDimV, kDeterministic>;
  const cudaStream_t stream = stream_of(backward.execution);
  Arena arena(backward.execution.workspace);
  const Workspace workspace(arena, backward, Traits::kHeadDim, Traits::kSumsRows);
  const PackedRows packed(arena, backward);
  const auto order = work_order<Traits>(backward);
  const auto key_sums = KeySums::take<Traits>(arena, order, kConsumers);
  const MergedParts merged(arena, order);
  const auto params = kernel_params<Traits>(backward, workspace, packed, order, key_sums, merged);
  cuda::backward::prepare<typename Traits::Element, Traits::kHeadDim>(backward, workspace);
  key_sums.clear_tickets(order, kConsumers, stream);
  merged.find(backward, workspace.transposed_mask, order, kBlockSize / Traits::kKeys);
  if (order.num_items > 0) {
    if constexpr (kHeadDim > 128) {
      launch_persistent<Traits>(wide::backward_kernel<Traits>, order.num_items, stream, params);
    } else if constexpr (kHeadDim > 64) {
      launch_persistent<Traits>(backward_kernel<Traits, Consumer>, order.num_items, stream, params);
    } else {
      launch_persistent<Traits>(backward_kernel<Traits, narrow::Consumer>, order.num_items, stream,
                                params);
    }
  }
  launch_finish_grad_query<Traits>(params);
  cuda::backward::finish_grad_sink(backward, workspace);
}

}  // namespace rrattn::cuda::sm90::backward
