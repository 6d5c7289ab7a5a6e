// Block-sparse flash attention on the CPU.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv], block_mask [B, Hq, Mq, words]
//     ->  out [B, Lq, Hq, Dv], lse [B, Hq, Lq]
//
// A thread takes one query block of up to kHeadsPerItem heads that share a key head, and walks the
// key blocks that any of them selected. So it reads K and V once for all of these heads. Queries
// are the lanes (tiles.h), which makes the online softmax plain vector arithmetic. A row begins with
// its sink. With compensation, tiles of the means of key blocks (block_means.h) follow.
#pragma once

#include "block_means.h"
#include "calls.h"
#include "masking.h"

namespace rrattn::cpu::RRATTN_SIMD {

constexpr int64_t kHeadsPerItem = 4;

struct AttendScratch {
  float* query_strips;           // [kHeadsPerItem][kStrips][D][kStrip]
  float* out_strips;             // [kHeadsPerItem][kStrips][Dv][kStrip]
  float *row_max, *row_sum;      // [kHeadsPerItem][kBlockSize]
  float *key_tile, *value_tile;  // [kBlockSize][D], [kBlockSize][Dv]
  float* scores;                 // [kBlockSize][kStrip]
  float* row_buffer;             // [D] or [Dv]

  AttendScratch(Arena& arena, const AttendParams& params) : AttendScratch(arena, params.heads) {}
  AttendScratch(Arena& arena, const Heads& heads)
      : query_strips(arena.take<float>(kHeadsPerItem * kBlockSize * heads.head_dim)),
        out_strips(arena.take<float>(kHeadsPerItem * kBlockSize * heads.head_dim_v)),
        row_max(arena.take<float>(kHeadsPerItem * kBlockSize)),
        row_sum(arena.take<float>(kHeadsPerItem * kBlockSize)),
        key_tile(arena.take<float>(kBlockSize * heads.head_dim)),
        value_tile(arena.take<float>(kBlockSize * heads.head_dim_v)),
        scores(arena.take<float>(kBlockSize * kStrip)),
        row_buffer(arena.take<float>(largest_head_dim(heads))) {}
};

// Turns scores[num_keys][kStrip] into probabilities relative to the new row_max, and updates
// row_sum. The output so far is then to be multiplied by rescale[kStrip].
inline void softmax_step(int64_t num_keys, float* scores, float* row_max, float* row_sum,
                         float* rescale) {
  for (int v = 0; v < kTileVecs; ++v) {
    float* column = scores + v * kLanes;
    const Vec old_max = load(row_max + v * kLanes);
    Vec new_max = old_max;
    for (int64_t i = 0; i < num_keys; ++i) new_max = max(new_max, load(column + i * kStrip));
    // Where nothing is seen yet, a base of 0 keeps -inf - base at -inf.
    const Vec base = new_max == kMinusInfinity ? Vec{} : new_max;
    Vec sum{};
    for (int64_t i = 0; i < num_keys; ++i) {
      const Vec p = exp2((load(column + i * kStrip) - base) * kLog2E);
      store(column + i * kStrip, p);
      sum += p;
    }
    const Vec factor = exp2((old_max - base) * kLog2E);
    store(rescale + v * kLanes, factor);
    store(row_max + v * kLanes, new_max);
    store(row_sum + v * kLanes, load(row_sum + v * kLanes) * factor + sum);
  }
}

// The strip of queries that starts at `column` of the block, against num_keys rows of tiles of keys
// and values. `adjust_scores` hides scores and adds to them; `softmax` does what softmax_step does.
template <typename AdjustScores, typename Softmax>
inline void attend_tile(const Heads& heads, int64_t slot, int64_t column, int64_t num_keys,
                        const float* key_tile, const float* value_tile, AttendScratch& scratch,
                        const AdjustScores& adjust_scores, const Softmax& softmax) {
  const int64_t head_dim = heads.head_dim, head_dim_v = heads.head_dim_v;
  float* query_strip = scratch.query_strips + (slot * kBlockSize + column) * head_dim;
  float* out_strip = scratch.out_strips + (slot * kBlockSize + column) * head_dim_v;
  float* row_max = scratch.row_max + slot * kBlockSize + column;
  float* row_sum = scratch.row_sum + slot * kBlockSize + column;
  alignas(64) float rescale[kStrip];
  multiply<Into::kFresh>(num_keys, head_dim, key_tile, head_dim, 1, query_strip, scratch.scores);
  adjust_scores();
  softmax(num_keys, scratch.scores, row_max, row_sum, rescale);
  multiply<Into::kScaledSum>(head_dim_v, num_keys, value_tile, 1, head_dim_v, scratch.scores,
                             out_strip, rescale);
}

// One strip of queries against one block of keys. `scale_scores(num_keys, scores)` comes before the
// mask.
template <typename ScaleScores, typename Softmax>
inline void attend_strip(const AttendParams& params, const HeadMask& mask, bool flash_mask,
                         int64_t first_query, int64_t first_key, int64_t slot,
                         AttendScratch& scratch, const ScaleScores& scale_scores,
                         const Softmax& softmax) {
  const Visibility& visibility = params.visibility;
  const int64_t last_query = first_query + clip_count(first_query, visibility.seqlen_q, kStrip) - 1;
  const int64_t end_key =
      visibility.causal ? last_query + visibility.shift() + 1 : visibility.seqlen_k;
  const int64_t num_keys = clip_count(first_key, end_key, kBlockSize);
  if (num_keys == 0 || last_query < first_query) return;

  const int64_t padded_keys = round_up(num_keys, kTileRows);
  const bool diagonal =
      visibility.causal && first_key + padded_keys - 1 > first_query + visibility.shift();
  const bool hides = diagonal || flash_mask || first_key + padded_keys > visibility.seqlen_k;
  attend_tile(
      params.heads, slot, first_query % kBlockSize, padded_keys, scratch.key_tile,
      scratch.value_tile, scratch,
      [&] {
        scale_scores(padded_keys, scratch.scores);
        if (!hides) return;
        mask_keys_by_queries(mask, flash_mask, first_key, padded_keys, first_query, scratch.scores);
      },
      softmax);
}

// Heads [first_head, first_head + num_heads), which share key head `key_head`, of one query block of
// a batch entry.
struct AttendItem {
  int64_t batch, key_head, first_head, num_heads, m_block;

  // The row of the block mask of one of its heads.
  const uint32_t* mask_row(const AttendParams& params, int64_t slot) const {
    const Visibility& visibility = params.visibility;
    const int64_t row =
        (batch * visibility.num_heads + first_head + slot) * visibility.num_m_blocks() + m_block;
    return params.block_mask + row * visibility.num_mask_words();
  }
};

// Attends the selected blocks of an item. `read_tiles(first_key, num_keys)` fills the tiles of keys
// and values of a block, where any head selected it; the other two are those of attend_strip, but
// for `scale_scores(slot, column, num_keys, scores)`.
template <typename ReadTiles, typename ScaleScores, typename Softmax>
inline void attend_selected_blocks(const AttendParams& params, const SpanBounds* block_bounds,
                                   const AttendItem& item, AttendScratch& scratch,
                                   const ReadTiles& read_tiles, const ScaleScores& scale_scores,
                                   const Softmax& softmax) {
  const Visibility& visibility = params.visibility;
  for (int64_t n_block = 0; n_block < visibility.num_n_blocks(); ++n_block) {
    const int64_t first_key = n_block * kBlockSize;
    bool tile_read = false;
    for (int64_t slot = 0; slot < item.num_heads; ++slot) {
      if (!selected(item.mask_row(params, slot), n_block)) continue;
      const HeadMask mask(visibility, block_bounds, item.batch, item.first_head + slot);
      const BlockKind kind = mask.kind(item.m_block, n_block);
      if (kind == BlockKind::kHidden) continue;
      if (!tile_read) {
        read_tiles(first_key, clip_count(first_key, visibility.seqlen_k, kBlockSize));
        tile_read = true;
      }
      const bool cleared = clear_unseen_keys(mask, kind, item.m_block, n_block,
                                             {{scratch.value_tile, params.heads.head_dim_v}});
      for (int64_t c = 0; c < kBlockSize; c += kStrip) {
        attend_strip(
            params, mask, kind == BlockKind::kPartial, item.m_block * kBlockSize + c, first_key,
            slot, scratch,
            [&](int64_t num_keys, float* scores) { scale_scores(slot, c, num_keys, scores); },
            softmax);
      }
      if (cleared) tile_read = false;  // the next head may see keys that this one does not
    }
  }
}

// A query block of one head against a tile of means: those of the blocks from first_block on that
// they stand in for, up to kBlockSize. A mean counts as often as its block has keys: the logarithm
// of that number adds to its score. `head` is the key head, over all batch entries.
inline void attend_means(const AttendParams& params, const HeadMask& mask, const uint32_t* mask_row,
                         const BlockMeans& means, int64_t head, int64_t m_block,
                         int64_t first_block, int64_t slot, AttendScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t num_blocks =
      clip_count(first_block, end_under_diagonal(visibility, m_block), kBlockSize);
  float added[kBlockSize];  // to the scores of each block
  bool any = false;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t n_block = first_block + i;
    const bool stands_in = stood_in_for(visibility, mask.block_bounds, mask_row, m_block, n_block);
    const int64_t num_keys = clip_count(n_block * kBlockSize, visibility.seqlen_k, kBlockSize);
    added[i] = stands_in ? __builtin_logf(static_cast<float>(num_keys)) : kMinusInfinity;
    any |= stands_in;
  }
  if (!any) return;
  const int64_t padded_blocks = round_up(num_blocks, kTileRows);
  for (int64_t i = num_blocks; i < padded_blocks; ++i) added[i] = kMinusInfinity;
  const float *key_tile = means.key(head, first_block),
              *value_tile = means.value(head, first_block);
  const int64_t num_queries = clip_count(m_block * kBlockSize, visibility.seqlen_q, kBlockSize);
  for (int64_t c = 0; c < num_queries; c += kStrip) {
    attend_tile(
        params.heads, slot, c, padded_blocks, key_tile, value_tile, scratch,
        [&] {
          for (int64_t i = 0; i < padded_blocks; ++i) {
            for (int v = 0; v < kTileVecs; ++v) {
              float* scores = scratch.scores + i * kStrip + v * kLanes;
              // Not a sum where it hides: a score may be NaN.
              store(scores,
                    added[i] == kMinusInfinity ? splat(kMinusInfinity) : load(scores) + added[i]);
            }
          }
        },
        softmax_step);
  }
}

inline void attend_item(const AttendCall& call, const SpanBounds* block_bounds,
                        const BlockMeans& means, const AttendItem& item, AttendScratch& scratch) {
  const AttendParams& params = call.params;
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim, head_dim_v = params.heads.head_dim_v;
  const int64_t first_query = item.m_block * kBlockSize;

  for (int64_t slot = 0; slot < item.num_heads; ++slot) {
    const int64_t head = item.first_head + slot;
    const HeadView query = key_head_of(params.query, params.heads, item.batch, head);
    for (int64_t c = 0; c < kBlockSize; c += kStrip) {
      read_strip(query, first_query + c, 1,
                 clip_count(first_query + c, visibility.seqlen_q, kStrip), params.softmax_scale,
                 scratch.query_strips + (slot * kBlockSize + c) * head_dim, scratch.row_buffer);
    }
    const float sink = params.sink ? params.sink[head] : kMinusInfinity;
    for (int64_t i = slot * kBlockSize; i < (slot + 1) * kBlockSize; ++i) {
      scratch.row_max[i] = sink;
      scratch.row_sum[i] = sink == kMinusInfinity ? 0 : 1;
    }
  }
  memset(scratch.out_strips, 0, item.num_heads * kBlockSize * head_dim_v * sizeof(float));

  const HeadView key = key_head_of(params.key, params.heads, item.batch, item.key_head, call.pages);
  const HeadView value =
      value_head_of(params.value, params.heads, item.batch, item.key_head, call.pages);
  attend_selected_blocks(
      params, block_bounds, item, scratch,
      [&](int64_t first_key, int64_t num_keys) {
        read_tile(key, first_key, num_keys, scratch.key_tile);
        read_tile(value, first_key, num_keys, scratch.value_tile);
      },
      [](int64_t, int64_t, int64_t, float*) {}, softmax_step);

  if (params.compensate) {
    const int64_t end = end_under_diagonal(visibility, item.m_block);
    for (int64_t first_block = 0; first_block < end; first_block += kBlockSize) {
      for (int64_t slot = 0; slot < item.num_heads; ++slot) {
        const HeadMask mask(visibility, block_bounds, item.batch, item.first_head + slot);
        attend_means(params, mask, item.mask_row(params, slot), means,
                     item.batch * params.heads.num_heads_k + item.key_head, item.m_block,
                     first_block, slot, scratch);
      }
    }
  }

  for (int64_t slot = 0; slot < item.num_heads; ++slot) {
    const int64_t head = item.first_head + slot;
    const HeadView out = value_head_of(params.out, params.heads, item.batch, head);
    const int64_t num_queries = clip_count(first_query, visibility.seqlen_q, kBlockSize);
    float* row_max = scratch.row_max + slot * kBlockSize;
    float* row_sum = scratch.row_sum + slot * kBlockSize;
    float* lse = params.lse + (item.batch * visibility.num_heads + head) * call.lse_head_stride +
                 first_query;
    for (int64_t i = 0; i < num_queries; ++i) {
      lse[i] = row_max[i] + __builtin_logf(row_sum[i]);
      row_sum[i] = row_sum[i] == 0 ? 0 : 1 / row_sum[i];
    }
    for (int64_t c = 0; c < num_queries; c += kStrip) {
      write_strip(out, first_query + c, clip_count(c, num_queries, kStrip),
                  scratch.out_strips + (slot * kBlockSize + c) * head_dim_v, row_sum + c,
                  scratch.row_buffer);
    }
  }
}

// Query heads of a key head.
inline int64_t group_size(const AttendParams& params) {
  return params.visibility.num_heads / params.heads.num_heads_k;
}

// Items of each block of queries, of all batch entries and heads.
inline int64_t items_per_m_block(const AttendParams& params) {
  return params.visibility.batch * params.heads.num_heads_k *
         ceil_div(group_size(params), kHeadsPerItem);
}

// One of them, of this number among them.
inline AttendItem item_of(const AttendParams& params, int64_t index, int64_t m_block) {
  const int64_t group = group_size(params);
  const int64_t chunks = ceil_div(group, kHeadsPerItem);
  const int64_t key_head = index / chunks % params.heads.num_heads_k;
  const int64_t first_head = key_head * group + index % chunks * kHeadsPerItem;
  return {index / chunks / params.heads.num_heads_k, key_head, first_head,
          clip_count(first_head, (key_head + 1) * group, kHeadsPerItem), m_block};
}

// Shared by all threads, of one call.
struct AttendShared {
  SpanBounds* block_bounds;  // [B, bounds heads, Mk]; nothing without FlashMask
  BlockMeans means;

  AttendShared(Arena& arena, const AttendCall& call)
      : block_bounds(arena.take<SpanBounds>(call.params.visibility.num_span_bounds(kBlockSize))),
        means(arena, call.params) {}
};

inline int64_t num_m_blocks_of(const AttendCall& call) {
  return call.params.visibility.num_m_blocks();
}

inline int64_t attend_workspace_bytes(const Calls<AttendCall>& calls) {
  Arena arena;
  take_for_each<AttendShared>(arena, calls);
  WorkQueue(arena, calls, 1, num_m_blocks_of);
  return workspace_bytes<AttendScratch>(arena, calls[0].params);
}

inline void run_attend(const Calls<AttendCall>& calls) {
  const AttendParams& all = calls[0].params;  // of what the calls have in common
  if (all.heads.num_heads_k == 0) return;     // there are no query heads either
  const int num_threads = all.execution.num_threads;
  Arena arena(all.execution.workspace);
  const AttendShared* shared = take_for_each<AttendShared>(arena, calls);
  const WorkQueue queue(arena, calls, 1, num_m_blocks_of);
  for (int64_t c = 0; c < calls.count; ++c) {
    compute_span_bounds(calls[c].params.visibility, kBlockSize, num_threads,
                        shared[c].block_bounds);
  }

  const auto num_means = [&](int64_t c) {
    return BlockMeans::num_heads(calls[c].params) * shared[c].means.rows;
  };
  const auto compute_means = [&](int thread, int64_t c, int64_t begin, int64_t end) {
    AttendScratch scratch = thread_scratch<AttendScratch>(arena, all, thread);
    const BlockMeans& means = shared[c].means;
    for (int64_t i = begin; i < end; ++i) {
      compute_block_mean(calls[c], means, i / means.rows, i % means.rows, scratch.row_buffer);
    }
  };
  parallel_for_calls(num_threads, calls.count, num_means,
                     grain_for(kBlockSize * (all.heads.head_dim + all.heads.head_dim_v)),
                     compute_means);

  const int64_t per_m_block = items_per_m_block(all);
  const auto attend_items = [&](int thread, int64_t begin, int64_t end) {
    AttendScratch scratch = thread_scratch<AttendScratch>(arena, all, thread);
    for (int64_t i = begin; i < end; ++i) {
      const WorkRow& row = queue.rows[i / per_m_block];
      attend_item(calls[row.call], shared[row.call].block_bounds, shared[row.call].means,
                  item_of(all, i % per_m_block, row.row), scratch);
    }
  };
  parallel_for(num_threads, per_m_block * queue.count, 1, attend_items);
}

}  // namespace rrattn::cpu::RRATTN_SIMD
