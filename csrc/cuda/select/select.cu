#include "kernel.cuh"
#include "stage.h"

namespace rrattn::cuda::select {

template <int kWarps, int kWords>
int64_t Stage<kWarps, kWords>::workspace_bytes(const SelectParams& params) {
  Arena arena;
  arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize));
  return arena.used();
}

template <int kWarps, int kWords>
void Stage<kWarps, kWords>::launch(const SelectParams& params) {
  const Visibility& visibility = params.visibility;
  const int64_t num_rows = visibility.num_mask_rows();
  if (num_rows == 0) return;
  const cudaStream_t stream = stream_of(params.execution);
  Arena arena(params.execution.workspace);
  auto* block_bounds = arena.take<SpanBounds>(visibility.num_span_bounds(kBlockSize));
  compute_span_bounds(visibility, kBlockSize, block_bounds, stream);
  const auto kernel = visibility.row_bounds.data ? select_kernel<kWarps, kWords, true>
                                                 : select_kernel<kWarps, kWords, false>;
  kernel<<<static_cast<unsigned>(num_rows), kWarps * 32, 0, stream>>>({params, block_bounds});
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template <int kWarps, int kWords>
int64_t Stage<kWarps, kWords>::ragged_workspace_bytes(const RaggedParams&, const RaggedPlan&) {
  return 0;
}

template <int kWarps, int kWords>
void Stage<kWarps, kWords>::launch_ragged(const RaggedParams& batch, const RaggedPlan& plan,
                                          void*) {
  const int64_t num_heads = batch.select.visibility.num_heads;
  ragged_select_kernel<kWarps, kWords>
      <<<static_cast<unsigned>(plan.max_row_blocks * num_heads), kWarps * 32, 0,
         stream_of(batch.execution)>>>(plan, static_cast<int>(num_heads));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

template struct Stage<1, 2>;
template struct Stage<1, 8>;
template struct Stage<2, 16>;
template struct Stage<4, 16>;
template struct Stage<8, 32>;

}  // namespace rrattn::cuda::select
