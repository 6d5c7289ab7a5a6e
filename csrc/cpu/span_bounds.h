// The FlashMask extremes of every span of keys: of blocks for selection, attention and gradients, of
// sample strides for the estimate.
#pragma once

#include "../core/geometry.h"

namespace rrattn::cpu {

// Fills bounds[B, bounds heads, ceil(Lk / span_length)]; nothing to do without FlashMask.
void compute_span_bounds(const Visibility& visibility, int64_t span_length, int num_threads,
                         SpanBounds* bounds);

}  // namespace rrattn::cpu
