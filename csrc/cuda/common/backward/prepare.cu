#include "../element.cuh"
#include "bound_keys.cuh"
#include "prepare.cuh"
#include "prepare_rows.cuh"
#include "transpose_mask.cuh"

namespace rrattn::cuda::backward {

template <typename Element, int kColumns>
void prepare(const BackwardParams& params, const Workspace& workspace) {
  const cudaStream_t stream = stream_of(params.execution);
  compute_span_bounds(params.visibility, kBlockSize, workspace.block_bounds, stream);
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_item, 0, sizeof(int), stream));
  if (params.deterministic) bound_keys<Element, kColumns>(params, workspace);
  prepare_rows<Element, kColumns>(params, workspace);
  transpose_mask(params, workspace);
}

#define RRATTN_INSTANTIATE_PREPARE(kColumns)                                             \
  template void prepare<ElementOf<DataType::kBFloat16>, kColumns>(const BackwardParams&, \
                                                                  const Workspace&);     \
  template void prepare<ElementOf<DataType::kFloat16>, kColumns>(const BackwardParams&,  \
                                                                 const Workspace&)
RRATTN_INSTANTIATE_PREPARE(64);
RRATTN_INSTANTIATE_PREPARE(128);
RRATTN_INSTANTIATE_PREPARE(256);

}  // namespace rrattn::cuda::backward
