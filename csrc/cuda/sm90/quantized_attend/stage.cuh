// Defines Stage: the launches of its kernels.
#pragma once

#include "kernel.cuh"
// kernel.cuh comes first, for config.cuh
#include "../../common/attend_sections.cuh"
#include "../../common/element.cuh"
#include "quantize.cuh"
#include "stage.h"

namespace rrattn::cuda::sm90::quantized_attend {

// Bytes that the keys and values of a section have in two bytes each: half of them in L2, which is
// as much as those of ../attend.
constexpr int64_t kSectionBytes = 64 << 20;

template <DataType kDataType, int kHeadDim>
int64_t Stage<kDataType, kHeadDim>::workspace_bytes(const AttendParams& params) {
  Arena arena;
  Workspace<kHeadDim>(arena, params);
  return arena.used();
}

template <DataType kDataType, int kHeadDim>
void Stage<kDataType, kHeadDim>::launch(const AttendParams& attend) {
  using Traits = KernelTraits<ElementOf<kDataType>, kHeadDim>;
  const cudaStream_t stream = stream_of(attend.execution);
  const Visibility& visibility = attend.visibility;
  if (visibility.batch * visibility.num_heads * visibility.seqlen_q == 0) return;
  Arena arena(attend.execution.workspace);
  const Workspace<kHeadDim> workspace(arena, attend);
  compute_span_bounds(visibility, kBlockSize, workspace.block_bounds, stream);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_item, 0, sizeof(int), stream));
  quantize<Traits>(attend, workspace, stream);

  const auto num_items = static_cast<int>(visibility.num_mask_rows());
  const int section_heads = attend_section_heads(attend, kSectionBytes);
  workspace.order.find(attend, section_heads);
  const KernelParams<kHeadDim> params{attend,
                                      workspace,
                                      num_items,
                                      section_heads,
                                      workspace.order.places,
                                      aligned_rows(attend.out)};
  const auto kernel = may_leave_unseen_keys(visibility) ? quantized_attend_kernel<Traits, true>
                                                        : quantized_attend_kernel<Traits, false>;
  launch_persistent<Traits>(kernel, num_items, stream, params);
}

}  // namespace rrattn::cuda::sm90::quantized_attend
