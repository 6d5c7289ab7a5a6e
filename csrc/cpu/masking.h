// Masking of a strip of scores, token by token, and what tells where that is needed.
#pragma once

#include "tiles.h"

namespace rrattn::cpu::RRATTN_SIMD {

// The block bounds and the FlashMask of one batch entry and query head; null pointers without
// FlashMask.
struct HeadMask {
  const Visibility& visibility;
  const SpanBounds* block_bounds = nullptr;
  const int32_t* bounds = nullptr;

  HeadMask(const Visibility& visibility, const SpanBounds* all_block_bounds, int64_t batch,
           int64_t head)
      : visibility(visibility) {
    const RowBounds& layout = visibility.row_bounds;
    if (layout.data == nullptr) return;
    block_bounds = span_bounds_of(visibility, kBlockSize, all_block_bounds, batch, head);
    bounds = row_bounds_of(layout, batch, visibility.bounds_head(head));
  }
  BlockKind kind(int64_t m_block, int64_t n_block) const {
    return classify_block(visibility, block_bounds, m_block, n_block);
  }
  KeyBounds key_bounds(int64_t key) const {
    return load_key_bounds(visibility.row_bounds, visibility.causal, bounds, key);
  }
};

RRATTN_INLINE VecInt inside(VecInt row, VecInt start, VecInt end) {
  return (row >= start) & (row < end);
}

RRATTN_INLINE void hide(float* scores, VecInt hidden) {
  store(scores, hidden ? splat(kMinusInfinity) : load(scores));
}

// Makes scores -inf where the query does not see the key. Rows of `scores` are keys, columns
// queries.
inline void mask_keys_by_queries(const HeadMask& mask, bool flash_mask, int64_t first_key,
                                 int64_t num_keys, int64_t first_query, float* scores) {
  const Visibility& visibility = mask.visibility;
  for (int64_t i = 0; i < num_keys; ++i) {
    const int64_t key = first_key + i;
    const int32_t first_row_that_sees =
        static_cast<int32_t>(visibility.causal ? key - visibility.shift() : 0);
    for (int v = 0; v < kTileVecs; ++v) {
      const VecInt row = lane_indices(static_cast<int32_t>(first_query) + v * kLanes);
      VecInt hidden = row < first_row_that_sees;
      if (key >= visibility.seqlen_k) {
        hidden = splat(-1);
      } else if (flash_mask) {
        const KeyBounds at = mask.key_bounds(key);
        hidden |= inside(row, splat(at.lower.start), splat(at.lower.end));
        hidden |= inside(row, splat(at.upper.start), splat(at.upper.end));
      }
      hide(scores + i * kStrip + v * kLanes, hidden);
    }
  }
}

// A tile of keys or values, [kBlockSize][head_dim].
struct KeyTile {
  float* rows;
  int64_t head_dim;
};

// Zeroes those rows of tiles whose key no row of the query block sees: a NaN or
// infinity there, even times a probability of 0, would make all rows NaN. Returns whether there are
// any.
inline bool clear_unseen_keys(const HeadMask& mask, BlockKind kind, int64_t m_block,
                              int64_t n_block, std::initializer_list<KeyTile> tiles) {
  const Visibility& visibility = mask.visibility;
  if (!may_hold_unseen_keys(visibility, kind, m_block, n_block)) return false;
  const int64_t first_row = m_block * kBlockSize, first_key = n_block * kBlockSize;
  const int64_t num_rows = clip_count(first_row, visibility.seqlen_q, kBlockSize);
  const int64_t num_keys = clip_count(first_key, visibility.seqlen_k, kBlockSize);
  bool cleared = false;
  for (int64_t i = 0; i < num_keys; ++i) {
    if (seen_by_rows(visibility, mask.bounds, first_key + i, first_row, first_row + num_rows - 1))
      continue;
    for (const KeyTile& tile : tiles)
      memset(tile.rows + i * tile.head_dim, 0, tile.head_dim * sizeof(float));
    cleared = true;
  }
  return cleared;
}

// Makes scores -inf where the query does not see the key. Rows of `scores` are queries, columns
// keys. Rows past the last query see nothing: intervals that hide a key may end there, and what it
// holds, NaN perhaps, would be in its gradients.
inline void mask_queries_by_keys(const HeadMask& mask, bool flash_mask, int64_t first_query,
                                 int64_t num_queries, int64_t first_key, float* scores) {
  const Visibility& visibility = mask.visibility;
  alignas(64) int32_t lower_start[kStrip], lower_end[kStrip], upper_start[kStrip],
      upper_end[kStrip];
  for (int c = 0; c < kStrip && flash_mask; ++c) {
    const int64_t last_key = visibility.seqlen_k - 1;  // columns past it are never stored
    const KeyBounds at = mask.key_bounds(first_key + c < last_key ? first_key + c : last_key);
    lower_start[c] = at.lower.start;
    lower_end[c] = at.lower.end;
    upper_start[c] = at.upper.start;
    upper_end[c] = at.upper.end;
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    const int32_t row = static_cast<int32_t>(first_query + i);
    const int32_t last_key_seen = row >= visibility.seqlen_q ? -1
                                  : visibility.causal
                                      ? row + static_cast<int32_t>(visibility.shift())
                                      : kRowInfinity;
    for (int v = 0; v < kTileVecs; ++v) {
      VecInt hidden = lane_indices(static_cast<int32_t>(first_key) + v * kLanes) > last_key_seen;
      if (flash_mask) {
        hidden |= inside(splat(row), load(lower_start + v * kLanes), load(lower_end + v * kLanes));
        hidden |= inside(splat(row), load(upper_start + v * kLanes), load(upper_end + v * kLanes));
      }
      hide(scores + i * kStrip + v * kLanes, hidden);
    }
  }
}

}  // namespace rrattn::cpu::RRATTN_SIMD
