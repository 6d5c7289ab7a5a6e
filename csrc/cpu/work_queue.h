// The order in which the threads take the work of all calls of a stage.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace rrattn::cpu {

// A query block of a call, or several that are worked on together, for all heads.
struct WorkRow {
  int64_t work;  // pairs of queries and keys
  int32_t call, row;
};

// Of the query blocks from m_block on: pairs of their queries and of the keys up to the diagonal of
// the last.
int64_t work_of_rows(const Visibility& visibility, int64_t m_block, int64_t num_blocks);

// Sorts them by their work, the most first, so that no thread begins a long one when the others are
// done. Equal ones go from the last row of a call to the first.
void longest_first(WorkRow* rows, int64_t count);

}  // namespace rrattn::cpu
