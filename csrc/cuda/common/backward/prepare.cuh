// What the gradients of block-sparse attention start from, on every path.
#pragma once

#include "workspace.cuh"

namespace rrattn::cuda::backward {

// Fills all of the workspace but grad_query, of whose sums it sets to zero those that sums_state says
// start so, or all where that is null. kColumns: the padded head size of queries and keys, 64, 128 or
// 256, and at least that of values. The kernels are compiled once for each GPU (prepare.cu), for bfloat16
// and float16.
template <typename Element, int kColumns>
void prepare(const BackwardParams& params, const Workspace& workspace);

}  // namespace rrattn::cuda::backward
