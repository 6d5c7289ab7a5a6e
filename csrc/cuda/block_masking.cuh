// Which blocks need a look at every score.
#pragma once

#include "../core/geometry.h"

namespace rrattn::cuda {

// Whether some scores between a query block and a key block that it sees may be hidden.
__device__ inline bool has_hidden_scores(const Visibility& visibility, BlockKind kind, int m_block,
                                         int n_block) {
  const int64_t end_key = (static_cast<int64_t>(n_block) + 1) * kBlockSize;
  const int64_t end_visible =
      visibility.causal ? min(static_cast<int64_t>(m_block) * kBlockSize + visibility.shift() + 1,
                              visibility.seqlen_k)
                        : visibility.seqlen_k;
  return kind == BlockKind::kPartial || end_key > end_visible;
}

}  // namespace rrattn::cuda
