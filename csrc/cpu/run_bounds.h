// The FlashMask extremes of every run of keys: of blocks for selection, attention and gradients, of
// sample strides for the estimate.
#pragma once

#include "../core/geometry.h"

namespace rrattn::cpu {

// Fills bounds[B, bounds heads, ceil(Lk / run_length)]; nothing to do without FlashMask.
void compute_run_bounds(const Visibility& visibility, int64_t run_length, int num_threads,
                        RunBounds* bounds);

}  // namespace rrattn::cpu
