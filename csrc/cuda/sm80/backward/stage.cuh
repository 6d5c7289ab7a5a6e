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

// Bytes of the queries, dO and sums of dQ of a section: what is read and added to stays in the L2 cache.
constexpr int64_t kSectionBytes = 64 << 20;

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic, TileTable kTable>
int64_t Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic, kTable>::workspace_bytes(
    const BackwardParams& params) {
  Arena arena;
  Workspace(arena, params, kHeadDim);
  return arena.used();
}

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic, TileTable kTable>
void Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic, kTable>::launch(
    const BackwardParams& backward) {
  using Element = ElementOf<kDataType>;
  using Traits = KernelTraits<Element, kHeadDim, kHeadDimV, kDeterministic, kTable>;
  const cudaStream_t stream = stream_of(backward.execution);
  const Visibility& visibility = backward.visibility;
  Arena arena(backward.execution.workspace);
  KernelParams params{backward, Workspace(arena, backward, kHeadDim)};
  const int64_t key_heads = visibility.batch * backward.heads.num_heads_k;
  params.num_items =
      static_cast<int>(key_heads * visibility.num_n_blocks() * (kBlockSize / Traits::kKeys));
  const int64_t padded_rows = rrattn::cuda::backward::num_padded_rows(visibility);
  const int64_t head_bytes =
      padded_rows / std::max<int64_t>(1, key_heads) *
      ((kHeadDim + kHeadDimV) * int64_t{sizeof(Element)} + kHeadDim * int64_t{sizeof(float)});
  params.section_heads = heads_in_section(kSectionBytes, head_bytes, key_heads);
  params.aligned_query = aligned_rows(backward.query);
  params.aligned_key = aligned_rows(backward.key);
  params.aligned_value = aligned_rows(backward.value);
  params.aligned_grad_out = aligned_rows(backward.grad_out);
  params.aligned_grad_query = aligned_rows(backward.grad_query);
  params.aligned_grad_key = aligned_rows(backward.grad_key);
  params.aligned_grad_value = aligned_rows(backward.grad_value);

  rrattn::cuda::backward::prepare<Element, kHeadDim>(backward, params.workspace);
  if (params.num_items > 0) {
    const auto kernel = may_leave_unseen_keys(visibility) ? backward_kernel<Traits, true>
                                                          : backward_kernel<Traits, false>;
    launch_kernel<Traits>(kernel, params.num_items, stream, params);
  }
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
