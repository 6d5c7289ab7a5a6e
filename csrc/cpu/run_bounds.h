// The FlashMask extremes of every run of keys: blocks for select and attend, sample strides for the
// estimate.
#pragma once

#include "../core/geometry.h"

namespace rrattn::cpu {

// Fills bounds[B, bounds heads, ceil(Lk / run_length)]; nothing to do without FlashMask.
void compute_run_bounds(const Visibility& visibility, int64_t run_length, int num_threads,
                        RunBounds* bounds);

// The part of `bounds` that holds for one query head; null without FlashMask.
inline const RunBounds* run_bounds_of(const Visibility& visibility, int64_t run_length,
                                      const RunBounds* bounds, int64_t batch, int64_t head) {
  const RowBounds& layout = visibility.row_bounds;
  if (layout.data == nullptr) return nullptr;
  return bounds + (batch * layout.num_heads + visibility.bounds_head(head)) *
                      ceil_div(visibility.seqlen_k, run_length);
}

}  // namespace rrattn::cpu
