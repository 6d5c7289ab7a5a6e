// Defines Stage: the launches of its kernels.
#pragma once

#include "../../common/backward/finish_grad_sink.cuh"
#include "../../common/backward/prepare.cuh"
#include "../../common/element.cuh"
#include "../../common/heads.cuh"
#include "finish_grad_query.cuh"
#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::sm80::backward {

using rrattn::cuda::backward::usable_scale;

// Bytes of the queries, dO and sums of dQ of a part of a walk. See docs/tuning.md.
constexpr int64_t kPartBytes = 64 << 20;

// Where they are enough to go round, the last key tiles of all heads, under the diagonal the shortest
// items, come after the others: so no long item is left for the end, when thread blocks would wait for
// it.
template <typename Traits>
int most_late_tiles(const BackwardParams& params) {
  const Visibility& visibility = params.visibility;
  const int64_t num_heads = visibility.batch * params.heads.num_heads_k;
  if (!visibility.causal || num_heads == 0) return 0;
  const int64_t blocks_of_part = kPartBytes / rrattn::cuda::backward::kPositionBytes<Traits> /
                                 group_size(visibility, params.heads);
  const int64_t tiles =
      std::min(visibility.num_n_blocks(), blocks_of_part) * (kBlockSize / Traits::kKeys) * 3 / 8;
  return num_heads * tiles < num_multiprocessors() / 2 ? 0 : static_cast<int>(tiles);
}

struct ItemOrder {
  WorkOrder order;
  int late_tiles;
};

template <typename Traits>
ItemOrder choose_order(const BackwardParams& params) {
  using rrattn::cuda::backward::choose_work_order;
  const int late_tiles = most_late_tiles<Traits>(params);
  const auto all_alike = choose_work_order<Traits>(params, kPartBytes);
  const auto some_late = choose_work_order<Traits>(params, kPartBytes, late_tiles);
  if (some_late.time < all_alike.time) return {some_late.order, late_tiles};
  return {all_alike.order, 0};
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic, kTable>::workspace_bytes(
    const BackwardParams& params) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim, kHeadDimV, kDeterministic, kTable>;
  Arena arena;
  Workspace(arena, params, kHeadDim);
  KeySums::take<Traits>(arena, choose_order<Traits>(params).order, 1);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic, TileTable kTable>
void Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic, kTable>::launch(
    const BackwardParams& backward) {
  using Element = ElementOf<kDataType>;
  using Traits = KernelTraits<Element, kHeadDim, kHeadDimV, kDeterministic, kTable>;
  const cudaStream_t stream = stream_of(backward.execution);
  Arena arena(backward.execution.workspace);
  const Workspace workspace(arena, backward, kHeadDim);
  const auto [order, late_tiles] = choose_order<Traits>(backward);
  const KernelParams params{backward,
                            workspace,
                            KeySums::take<Traits>(arena, order, 1),
                            order,
                            late_tiles,
                            usable_scale(backward.softmax_scale) * kLog2E,
                            aligned_rows(backward.query),
                            aligned_rows(backward.key),
                            aligned_rows(backward.value),
                            aligned_rows(backward.grad_out),
                            aligned_rows(backward.grad_query),
                            aligned_rows(backward.grad_key),
                            aligned_rows(backward.grad_value)};

  rrattn::cuda::backward::prepare<Element, kHeadDim>(backward, workspace);
  params.key_sums.clear_tickets(order, 1, stream);
  if (params.num_items() > 0) {
    const auto kernel = may_leave_unseen_keys(backward.visibility) ? backward_kernel<Traits, true>
                                                                   : backward_kernel<Traits, false>;
    launch_kernel<Traits>(kernel, params.num_items(), stream, params);
  }
  const int64_t padded_rows = rrattn::cuda::backward::num_padded_rows(backward.visibility);
  if (padded_rows > 0) {
    finish_grad_query_kernel<Traits>
        <<<static_cast<unsigned>(padded_rows / Traits::kQueries), Traits::kThreads, 0, stream>>>(
            params);
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  rrattn::cuda::backward::finish_grad_sink(backward, params.workspace);
}

}  // namespace rrattn::cuda::sm80::backward

// The stage in both modes, for all tile tables.
#define RRATTN_INSTANTIATE_BACKWARD_TABLE(kDataType, kHeadDim, kHeadDimV, kTable)             \
  template struct rrattn::cuda::sm80::backward::Stage<kDataType, kHeadDim, kHeadDimV, false,  \
                                                      rrattn::cuda::sm80::TileTable::kTable>; \
  template struct rrattn::cuda::sm80::backward::Stage<kDataType, kHeadDim, kHeadDimV, true,   \
                                                      rrattn::cuda::sm80::TileTable::kTable>
#define RRATTN_INSTANTIATE_BACKWARD(kDataType, kHeadDim, kHeadDimV)          \
  RRATTN_INSTANTIATE_BACKWARD_TABLE(kDataType, kHeadDim, kHeadDimV, k99KB);  \
  RRATTN_INSTANTIATE_BACKWARD_TABLE(kDataType, kHeadDim, kHeadDimV, k163KB); \
  RRATTN_INSTANTIATE_BACKWARD_TABLE(kDataType, kHeadDim, kHeadDimV, k227KB)
