// The FlashMask extremes of every run of keys on the GPU: of a block, a sample stride, or a tile of
// strides.
#pragma once

#include "../../core/geometry.h"
#include "launch.cuh"

namespace rrattn::cuda {

// Fills bounds[B, bounds heads, ceil(Lk / run_length)]; nothing to do without FlashMask.
void compute_run_bounds(const Visibility& visibility, int64_t run_length, RunBounds* bounds,
                        cudaStream_t stream);

}  // namespace rrattn::cuda
