// What the stages need to run several calls as one: memory that the threads share, and one queue of
// the rows of all calls.
#pragma once

#include "tiles.h"

namespace rrattn::cpu::RRATTN_SIMD {

// A `Shared` of each call, made of the arena and the call; only counted where the arena counts.
template <typename Shared, typename Call>
const Shared* take_for_each(Arena& arena, const Calls<Call>& calls) {
  Shared* all = arena.take<Shared>(calls.count);
  for (int64_t c = 0; c < calls.count; ++c) {
    const Shared own(arena, calls[c]);
    if (!arena.only_counts()) all[c] = own;
  }
  return all;
}

// The rows of all calls, the longest first. rows_of(call) tells how many one has,
// m_blocks_per_row how many query blocks a row stands for.
struct WorkQueue {
  int64_t count = 0;
  WorkRow* rows;

  template <typename Call, typename RowsOf>
  WorkQueue(Arena& arena, const Calls<Call>& calls, int64_t m_blocks_per_row,
            const RowsOf& rows_of) {
    for (int64_t c = 0; c < calls.count; ++c) count += rows_of(calls[c]);
    rows = arena.take<WorkRow>(count);
    if (arena.only_counts()) return;
    WorkRow* next = rows;
    for (int64_t c = 0; c < calls.count; ++c) {
      for (int64_t row = 0; row < rows_of(calls[c]); ++row) {
        *next++ = {
            work_of_rows(calls[c].params.visibility, row * m_blocks_per_row, m_blocks_per_row),
            static_cast<int32_t>(c), static_cast<int32_t>(row)};
      }
    }
    longest_first(rows, count);
  }
  // Of all rows together.
  int64_t work() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += rows[i].work;
    return total;
  }
};

}  // namespace rrattn::cpu::RRATTN_SIMD
