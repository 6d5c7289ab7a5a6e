// The shapes of what the stages write, from those of what they read. A size that is not known yet
// (-1, while a program is being built) stays -1.
#pragma once

#include <vector>

#include "../core/arguments.h"

namespace rrattn {

using Shape = std::vector<int64_t>;

inline void check_ranks(const Shape& query, const Shape& key) {
  require_rank("query", query, 4, "[batch, seqlen_q, num_heads, head_dim]");
  require_rank("key", key, 4, "[batch, seqlen_k, num_heads_k, head_dim]");
}

inline Shape scores_shape(const Shape& query, const Shape& key) {
  check_ranks(query, key);
  const auto num_blocks = [](int64_t length) {
    return length < 0 ? -1 : ceil_div(length, kBlockSize);
  };
  return {query[0], query[2], num_blocks(query[1]), num_blocks(key[1])};
}

inline Shape mask_shape(const Shape& scores) {
  require_rank("block_scores", scores, 4, "[batch, num_heads, query blocks, key blocks]");
  const int64_t blocks = scores[3];
  return {scores[0], scores[1], scores[2], blocks < 0 ? -1 : ceil_div(blocks, kMaskWordBits)};
}

inline Shape out_shape(const Shape& query, const Shape& value) {
  require_rank("value", value, 4, "[batch, seqlen_k, num_heads_k, head_dim of value]");
  return {query[0], query[1], query[2], value[3]};
}

inline Shape lse_shape(const Shape& query) { return {query[0], query[2], query[1]}; }

}  // namespace rrattn
