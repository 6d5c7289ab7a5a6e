#include "work_queue.h"

#include <algorithm>
#include <tuple>

namespace rrattn::cpu {

int64_t work_of_rows(const Visibility& visibility, int64_t m_block, int64_t num_blocks) {
  const int64_t first_row = m_block * kBlockSize;
  const int64_t end_row = std::min(first_row + num_blocks * kBlockSize, visibility.seqlen_q);
  const int64_t num_keys = visibility.causal
                               ? std::min(end_row + visibility.shift(), visibility.seqlen_k)
                               : visibility.seqlen_k;
  return (end_row - first_row) * num_keys;
}

void longest_first(WorkRow* rows, int64_t count) {
  std::sort(rows, rows + count, [](const WorkRow& a, const WorkRow& b) {
    return std::make_tuple(-a.work, a.call, -a.row) < std::make_tuple(-b.work, b.call, -b.row);
  });
}

}  // namespace rrattn::cpu
