// The order in which the rows of a block mask are attended.
//
// It goes section by section (attend_sections.cuh), in a section from the last rows to the first.
// But where few blocks are selected some rows have many times as many as the others: the last ones,
// which keep all, or those of queries that look everywhere. Whoever takes such a row late is still at
// it when all else is done. So the long rows of all sections come first, the longest before the
// others. See docs/tuning.md.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

namespace rrattn::cuda {

// In the workspace.
struct RowOrder {
  // Of the rows as they are taken, their places in the order by sections; null: they are taken in that.
  int* places = nullptr;
  int* num_blocks = nullptr;  // of the row at each place

  // Takes nothing where ordering the rows would take longer than it saves.
  RowOrder(Arena& arena, const AttendParams& params);

  // Fills `places`.
  void find(const AttendParams& params, int section_heads) const;
};

}  // namespace rrattn::cuda
