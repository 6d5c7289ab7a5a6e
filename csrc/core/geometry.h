// Block geometry: which key blocks a query block can see, under the causal diagonal and FlashMask.
//
// FlashMask gives each key two half-open row intervals, [lower_start, lower_end) and
// [upper_start, upper_end); a row inside either does not see the key. Over a span of keys (a block,
// or a sample stride) only the extremes of these bounds count. To the rows of a query block a key
// block is
//
//   hidden   when no row sees any of its keys: the block lies above the diagonal, or all rows lie
//            in the lower interval of every key, or all in the upper one;
//   partial  when it is not hidden, but some row may lie in an interval of some key ("touched" in
//            the docs);
//   open     when FlashMask masks nothing in it. The diagonal still may.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "params.h"

namespace rrattn {

constexpr int32_t kRowInfinity = std::numeric_limits<int32_t>::max();
constexpr int32_t kRowMinusInfinity = std::numeric_limits<int32_t>::min();

struct Interval {
  int32_t start, end;
  RRATTN_HOST_DEVICE bool contains(int64_t row) const { return start <= row && row < end; }
};

struct KeyBounds {
  Interval lower, upper;
  RRATTN_HOST_DEVICE bool mask(int64_t row) const {
    return lower.contains(row) || upper.contains(row);
  }
};

// `bounds` points at the first key of a batch entry and head.
RRATTN_HOST_DEVICE inline KeyBounds load_key_bounds(const RowBounds& layout, bool causal,
                                                    const int32_t* bounds, int64_t key) {
  const int32_t* at = bounds + key * layout.key_stride;
  const auto bound = [&](int i) { return at[i * layout.bound_stride]; };
  const Interval none{kRowInfinity, kRowInfinity};
  if (causal) return {{bound(0), layout.num_bounds == 2 ? bound(1) : kRowInfinity}, none};
  if (layout.num_bounds == 2) return {{bound(0), kRowInfinity}, {kRowMinusInfinity, bound(1)}};
  return {{bound(0), bound(1)}, {bound(2), bound(3)}};
}

RRATTN_HOST_DEVICE inline const int32_t* row_bounds_of(const RowBounds& layout, int64_t batch,
                                                       int64_t head) {
  return layout.data + batch * layout.batch_stride + head * layout.head_stride;
}

// Whether any of these rows sees the key. `bounds` is as in load_key_bounds; null without
// FlashMask.
RRATTN_HOST_DEVICE inline bool seen_by_rows(const Visibility& visibility, const int32_t* bounds,
                                            int64_t key, int64_t first_row, int64_t last_row) {
  int64_t row = visibility.causal ? std::max(first_row, key - visibility.shift()) : first_row;
  if (bounds != nullptr) {
    const KeyBounds at = load_key_bounds(visibility.row_bounds, visibility.causal, bounds, key);
    // Past the end of one interval the row may lie in the other; past both ends it lies in neither.
    if (at.lower.contains(row)) row = at.lower.end;
    if (at.upper.contains(row)) row = at.upper.end;
    if (at.lower.contains(row)) row = at.lower.end;
  }
  return row <= last_row;
}

// Whether any row of any of the `group` query heads of a key head sees the key. A key that no row
// sees may hold anything: padding, or slots of a cache that nothing was written to.
RRATTN_HOST_DEVICE inline bool seen_by_group(const Visibility& visibility, int64_t group,
                                             int64_t batch, int64_t key_head, int64_t key) {
  if (visibility.row_bounds.data == nullptr) return true;
  const int64_t end = visibility.bounds_head((key_head + 1) * group - 1) + 1;
  for (int64_t head = visibility.bounds_head(key_head * group); head < end; ++head) {
    const int32_t* bounds = row_bounds_of(visibility.row_bounds, batch, head);
    if (seen_by_rows(visibility, bounds, key, 0, visibility.seqlen_q - 1)) return true;
  }
  return false;
}

// The extremes of one of the two intervals over a span of keys. Rows in [max_start, min_end) are
// masked for every key; rows outside [min_start, max_end) are masked for none.
struct IntervalExtremes {
  int32_t max_start = kRowMinusInfinity, min_end = kRowInfinity;
  int32_t min_start = kRowInfinity, max_end = kRowMinusInfinity;

  RRATTN_HOST_DEVICE void add(const Interval& interval) {
    max_start = std::max(max_start, interval.start);
    min_end = std::min(min_end, interval.end);
    min_start = std::min(min_start, interval.start);
    max_end = std::max(max_end, interval.end);
  }
  RRATTN_HOST_DEVICE bool hides(int64_t first_row, int64_t last_row) const {
    return first_row >= max_start && last_row < min_end;
  }
  RRATTN_HOST_DEVICE bool meets(int64_t first_row, int64_t last_row) const {
    return first_row < max_end && last_row >= min_start;
  }
};

struct SpanBounds {
  IntervalExtremes lower, upper;

  RRATTN_HOST_DEVICE bool hides(int64_t first_row, int64_t last_row) const {
    return lower.hides(first_row, last_row) || upper.hides(first_row, last_row);
  }
  RRATTN_HOST_DEVICE bool meets(int64_t first_row, int64_t last_row) const {
    return lower.meets(first_row, last_row) || upper.meets(first_row, last_row);
  }
};

RRATTN_HOST_DEVICE inline SpanBounds span_bounds(const RowBounds& layout, bool causal,
                                                 const int32_t* bounds, int64_t first_key,
                                                 int64_t end_key) {
  SpanBounds span;
  for (int64_t key = first_key; key < end_key; ++key) {
    const KeyBounds at = load_key_bounds(layout, causal, bounds, key);
    span.lower.add(at.lower);
    span.upper.add(at.upper);
  }
  return span;
}

// The part of `bounds`, [B, bounds heads, spans], that applies to one query head; null without
// FlashMask.
RRATTN_HOST_DEVICE inline const SpanBounds* span_bounds_of(const Visibility& visibility,
                                                           int64_t span_length,
                                                           const SpanBounds* bounds, int64_t batch,
                                                           int64_t head) {
  const RowBounds& layout = visibility.row_bounds;
  if (layout.data == nullptr) return nullptr;
  return bounds + (batch * layout.num_heads + visibility.bounds_head(head)) *
                      ceil_div(visibility.seqlen_k, span_length);
}

// Where a query block's row of the block mask is, among the rows and among the key blocks.
struct MaskRow {
  bool causal;
  bool is_last;
  // When causal, the key blocks from first_own to before end_own hold the own positions of the
  // block's queries, and those from there on are hidden.
  int first_own, end_own;
};

RRATTN_HOST_DEVICE inline MaskRow mask_row_of(const Visibility& visibility, int64_t m_block) {
  const int64_t first_row = m_block * kBlockSize;
  const int64_t last_row = std::min(first_row + kBlockSize, visibility.seqlen_q) - 1;
  return {visibility.causal, m_block == visibility.num_m_blocks() - 1,
          static_cast<int>((first_row + visibility.shift()) / kBlockSize),
          static_cast<int>((last_row + visibility.shift()) / kBlockSize) + 1};
}

// The bits of a word of the mask that stand for key blocks before `end`.
RRATTN_HOST_DEVICE inline uint32_t bits_before(int end, int word) {
  const int count = std::min(std::max(end - kMaskWordBits * word, 0), int{kMaskWordBits});
  return static_cast<uint32_t>((1ull << count) - 1);
}

// Which key blocks of a word of the mask the rules keep in a row, whatever they score. Hidden ones
// may be among them, which are not kept all the same; blocks that FlashMask masks in part are kept
// besides. `first_visible` is the row's first visible key block.
RRATTN_HOST_DEVICE inline uint32_t kept_by_rule(const KeepRules& rules, const MaskRow& row,
                                                int first_visible, int word) {
  uint32_t kept = 0;
  if (row.causal) kept |= ~bits_before(row.first_own - static_cast<int>(rules.keep_local), word);
  if (rules.keep_sink && first_visible / kMaskWordBits == word) {
    kept |= 1u << first_visible % kMaskWordBits;
  }
  if (rules.keep_last && row.is_last) kept = ~0u;
  return kept;
}

// The least mass of a block that the threshold keeps, of a row with this mass.
RRATTN_HOST_DEVICE inline double least_mass(float min_share, int64_t row_sum, int64_t num_visible) {
  return static_cast<double>(min_share) * static_cast<double>(row_sum) /
         static_cast<double>(num_visible);
}

enum class BlockKind { kHidden, kPartial, kOpen };

// `block_bounds` has the bounds of each key block for one batch entry and head; null without
// FlashMask.
RRATTN_HOST_DEVICE inline BlockKind classify_block(const Visibility& visibility,
                                                   const SpanBounds* block_bounds, int64_t m_block,
                                                   int64_t n_block) {
  const int64_t first_row = m_block * kBlockSize;
  const int64_t last_row = std::min(first_row + kBlockSize, visibility.seqlen_q) - 1;
  if (visibility.causal && n_block * kBlockSize > last_row + visibility.shift())
    return BlockKind::kHidden;
  if (block_bounds == nullptr) return BlockKind::kOpen;
  if (block_bounds[n_block].hides(first_row, last_row)) return BlockKind::kHidden;
  return block_bounds[n_block].meets(first_row, last_row) ? BlockKind::kPartial : BlockKind::kOpen;
}

// Whether a key block that a query block sees may hold keys that no row of the query block sees.
RRATTN_HOST_DEVICE inline bool may_hold_unseen_keys(const Visibility& visibility, BlockKind kind,
                                                    int64_t m_block, int64_t n_block) {
  if (kind == BlockKind::kPartial) return true;
  const int64_t end_row = std::min((m_block + 1) * kBlockSize, visibility.seqlen_q);
  const int64_t end_key = std::min((n_block + 1) * kBlockSize, visibility.seqlen_k);
  return visibility.causal && end_key > end_row + visibility.shift();
}

RRATTN_HOST_DEVICE inline bool selected(const uint32_t* mask_row, int64_t n_block) {
  return (mask_row[n_block / kMaskWordBits] >> (n_block % kMaskWordBits)) & 1u;
}

// The end of the key blocks that lie under the diagonal of every row of a query block: of all, when
// not causal.
RRATTN_HOST_DEVICE inline int64_t end_under_diagonal(const Visibility& visibility,
                                                     int64_t m_block) {
  if (!visibility.causal) return visibility.num_n_blocks();
  return (m_block * kBlockSize + visibility.shift() + 1) / kBlockSize;
}

// Whether, with AttendParams::compensate, the mean key and value of a key block stand in for its
// keys and values: it is not selected, and every row of the query block sees all of it, so it is
// open and under the diagonal. `block_bounds` is as in classify_block.
RRATTN_HOST_DEVICE inline bool stood_in_for(const Visibility& visibility,
                                            const SpanBounds* block_bounds,
                                            const uint32_t* mask_row, int64_t m_block,
                                            int64_t n_block) {
  if (n_block >= end_under_diagonal(visibility, m_block) || selected(mask_row, n_block))
    return false;
  const int64_t first_row = m_block * kBlockSize;
  const int64_t last_row = std::min(first_row + kBlockSize, visibility.seqlen_q) - 1;
  return block_bounds == nullptr || !block_bounds[n_block].meets(first_row, last_row);
}

}  // namespace rrattn
