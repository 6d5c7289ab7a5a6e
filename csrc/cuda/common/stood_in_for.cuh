// Which key blocks means stand in for, for attention that is compensated.
#pragma once

#include <cuda_runtime.h>

#include "../../core/geometry.h"

namespace rrattn::cuda {

// Fills words[B, Hq, Mq, ceil(Mk / 32)], laid out like the block mask. The producers of attention
// have no registers left to find it out themselves.
void find_stood_in_for(const AttendParams& params, const SpanBounds* block_bounds, uint32_t* words,
                       cudaStream_t stream);

}  // namespace rrattn::cuda
