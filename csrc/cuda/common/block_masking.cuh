// In which blocks every score has to be checked.
#pragma once

#include "../../core/geometry.h"

namespace rrattn::cuda {

// The first key that the first row of a query block does not see; the end of the keys if it sees
// all.
__device__ inline int first_hidden_key(const Visibility& visibility, int m_block) {
  const int64_t end = visibility.causal
                          ? min(static_cast<int64_t>(m_block) * kBlockSize + visibility.shift() + 1,
                                visibility.seqlen_k)
                          : visibility.seqlen_k;
  return static_cast<int>(end);
}

// The end of the keys that the last row of a query block may see, when causal.
__device__ inline int end_key(const Visibility& visibility, int m_block) {
  const int64_t end_row =
      min((static_cast<int64_t>(m_block) + 1) * kBlockSize, visibility.seqlen_q);
  return static_cast<int>(end_row + visibility.shift());
}

// The end of the key blocks that it may see, causal or not.
__device__ inline int end_block(const Visibility& visibility, int m_block) {
  if (!visibility.causal) return static_cast<int>(visibility.num_n_blocks());
  return (end_key(visibility, m_block) + kBlockSize - 1) / kBlockSize;
}

// Whether some scores between a query block and a key block that it sees may be hidden.
__device__ inline bool has_hidden_scores(const Visibility& visibility, BlockKind kind, int m_block,
                                         int n_block) {
  return kind == BlockKind::kPartial ||
         (n_block + 1) * kBlockSize > first_hidden_key(visibility, m_block);
}

// Whether, under FlashMask or the diagonal, a block that some row sees may hold keys that none
// sees.
__host__ __device__ inline bool may_leave_unseen_keys(const Visibility& visibility) {
  return visibility.row_bounds.data != nullptr ||
         (visibility.causal && visibility.shift() % kBlockSize != 0);
}

}  // namespace rrattn::cuda
