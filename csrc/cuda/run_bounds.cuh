// The FlashMask extremes of every run of keys on the GPU: of a block, a sample stride, or a tile of
// strides.
#pragma once

#include "../core/geometry.h"
#include "launch.cuh"

namespace rrattn::cuda {

// Fills bounds[B, bounds heads, ceil(Lk / run_length)]; nothing to do without FlashMask.
void compute_run_bounds(const Visibility& visibility, int64_t run_length, RunBounds* bounds,
                        cudaStream_t stream);

// The part of `bounds` that holds for one query head; null without FlashMask.
__device__ inline const RunBounds* run_bounds_of(const Visibility& visibility, int64_t run_length,
                                                 const RunBounds* bounds, int64_t batch,
                                                 int64_t head) {
  const RowBounds& layout = visibility.row_bounds;
  if (layout.data == nullptr) return nullptr;
  return bounds + (batch * layout.num_heads + visibility.bounds_head(head)) *
                      ceil_div(visibility.seqlen_k, run_length);
}

}  // namespace rrattn::cuda
