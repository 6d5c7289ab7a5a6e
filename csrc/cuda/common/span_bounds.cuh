// The FlashMask extremes of every span of keys on the GPU: of a block, a sample stride, or a tile of
// strides.
#pragma once

#include "../../core/geometry.h"
#include "launch.cuh"

namespace rrattn::cuda {

// Fills bounds[B, bounds heads, ceil(Lk / span_length)]; nothing to do without FlashMask.
void compute_span_bounds(const Visibility& visibility, int64_t span_length, SpanBounds* bounds,
                         cudaStream_t stream);

}  // namespace rrattn::cuda
