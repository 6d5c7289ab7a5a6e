// The gradient of the sink, a logit of each head that joins the softmax of its rows and has no value:
//
//   grad_sink[h] = sum over the head's rows of exp(sink[h] - lse) (-delta + gradient of lse)
//
// The last factor is what dP starts from.
#pragma once

#include "workspace.cuh"

namespace rrattn::cuda::backward {

// Fills grad_sink from a workspace that `prepare` filled; nothing to do without sink.
void finish_grad_sink(const BackwardParams& params, const Workspace& workspace);

}  // namespace rrattn::cuda::backward
