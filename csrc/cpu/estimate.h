// Block scores on the CPU.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D]  ->  block_scores [B, Hq, Mq, Mk]
//
// Keys are summed over each stride, and the variance within it found, once. Then a thread takes a
// strip of sampled queries (the lanes, tiles.h) and walks the strides, once, in tiles of 128. It
// keeps the sum of each key block relative to the base that the softmax had at that tile, and the
// base of each tile; at the end it brings all sums to the final base. The matrix of stride scores is
// never stored, only a row of block sums for each lane.
#pragma once

#include "calls.h"
#include "masking.h"

namespace rrattn::cpu::RRATTN_SIMD {

constexpr int64_t kStridesPerTile = 128;

struct EstimateShape {
  int64_t stride, samples_per_block;      // of the queries, in tokens
  int64_t key_stride, strides_per_block;  // of the keys, in tokens
  int64_t num_strides;                    // of the keys
  int64_t num_tiles;                      // of kStridesPerTile strides
  int64_t blocks_per_tile;
  int64_t m_blocks_per_item, strips_per_item;  // one of the two is 1

  explicit EstimateShape(const EstimateParams& params)
      : stride(params.sampling.stride),
        samples_per_block(kBlockSize / stride),
        key_stride(params.sampling.key_stride),
        strides_per_block(kBlockSize / key_stride),
        num_strides(ceil_div(params.visibility.seqlen_k, key_stride)),
        num_tiles(ceil_div(num_strides, kStridesPerTile)),
        blocks_per_tile(kStridesPerTile / strides_per_block),
        m_blocks_per_item(samples_per_block < kStrip ? kStrip / samples_per_block : 1),
        strips_per_item(samples_per_block < kStrip ? 1 : samples_per_block / kStrip) {}
};

// Shared by all threads, written before the walk.
struct PooledKeys {
  float* keys;         // [B, Hkv, num_strides, D], and room for a last tile that reads past the end
  float* variances;    // [B, Hkv, num_strides]: the mean over D; nothing without spread
  SpanBounds* bounds;  // [B, bounds heads, num_strides]; nothing without FlashMask

  PooledKeys(Arena& arena, const EstimateCall& call) {
    const EstimateParams& params = call.params;
    const EstimateShape shape(params);
    const Visibility& visibility = params.visibility;
    const int64_t strides = visibility.batch * params.heads.num_heads_k * shape.num_strides;
    const int64_t rows = call.scores_wanted ? strides + kStridesPerTile : 0;
    keys = arena.take<float>(rows * params.heads.head_dim);
    variances = arena.take<float>(params.sampling.spread > 0 ? rows : 0);
    bounds = arena.take<SpanBounds>(visibility.num_span_bounds(shape.key_stride));
  }
};

struct EstimateScratch {
  float* query_strip;  // [D][kStrip]
  float* scores;       // [kStridesPerTile][kStrip]
  float* block_sums;   // [num_tiles * blocks_per_tile][kStrip], relative to 2^base of their tile
  float* tile_base;    // [num_tiles][kStrip]
  float* row_buffer;   // [D]
  float* squares;      // [D]

  EstimateScratch(Arena& arena, const EstimateParams& params) {
    const EstimateShape shape(params);
    query_strip = arena.take<float>(params.heads.head_dim * kStrip);
    scores = arena.take<float>(kStridesPerTile * kStrip);
    block_sums = arena.take<float>(shape.num_tiles * shape.blocks_per_tile * kStrip);
    tile_base = arena.take<float>(shape.num_tiles * kStrip);
    row_buffer = arena.take<float>(params.heads.head_dim);
    squares = arena.take<float>(params.heads.head_dim);
  }
};

inline bool is_finite(const float* row, int64_t head_dim) {
  float zero = 0;
  for (int64_t d = 0; d < head_dim; ++d) zero += row[d] * 0;  // NaN for what is not finite
  return zero == 0;
}

// A stride of the keys of a request, in the cache beside its pages: D sums, then their variance.
inline float* cached_stride(const EstimateCall& call, int64_t key_head, int64_t first_key) {
  const EstimateParams& params = call.params;
  const int64_t strides_per_page = call.pages.page_size / params.sampling.key_stride;
  const int64_t page = call.pages.table[first_key / call.pages.page_size];
  const int64_t stride = first_key % call.pages.page_size / params.sampling.key_stride;
  return call.pooled.data +
         ((page * params.heads.num_heads_k + key_head) * strides_per_page + stride) *
             (params.heads.head_dim + 1);
}

// The variance of the `count` keys of a stride, and of zeros for those that it lacks, around the
// mean, over D. read_key(r) puts key r of the stride into `row`.
template <typename ReadKey>
float variance_of(const float* sum, int64_t count, int64_t key_stride, int64_t head_dim,
                  const ReadKey& read_key, float* row, float* squares) {
  memset(squares, 0, head_dim * sizeof(float));
  const auto length = static_cast<float>(key_stride);
  for (int64_t r = 0; r < key_stride; ++r) {
    if (r < count) read_key(r);
    if (r == count) memset(row, 0, head_dim * sizeof(float));
    for (int64_t d = 0; d < head_dim; ++d) {
      const float difference = row[d] - sum[d] / length;
      squares[d] += difference * difference;
    }
  }
  float total = 0;
  for (int64_t d = 0; d < head_dim; ++d) total += squares[d];
  return total / (length * static_cast<float>(head_dim));
}

// Sums the keys of strides [begin, end) over all key heads, and finds their variance. A NaN or
// infinity in a key that no query sees counts as zero, and so do the keys that the last stride
// lacks. Where strides are kept beside the pages, those that only hold tokens of earlier calls come
// from there, and the others go there.
inline void pool_strides(const EstimateCall& call, const PooledKeys& pooled, int64_t begin,
                         int64_t end, const EstimateScratch& scratch) {
  const EstimateParams& params = call.params;
  const EstimateShape shape(params);
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim, num_heads_k = params.heads.num_heads_k;
  const int64_t group = visibility.num_heads / num_heads_k;
  float* row = scratch.row_buffer;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first_key = i % shape.num_strides * shape.key_stride;
    const int64_t head = i / shape.num_strides;
    const int64_t batch = head / num_heads_k, key_head = head % num_heads_k;
    float* cached = call.pooled.data ? cached_stride(call, key_head, first_key) : nullptr;
    float* sum = call.scores_wanted ? pooled.keys + i * head_dim : cached;
    if (cached && first_key + shape.key_stride <= call.pooled.num_cached) {
      if (!call.scores_wanted) continue;
      memcpy(sum, cached, head_dim * sizeof(float));
      if (params.sampling.spread > 0) pooled.variances[i] = cached[head_dim];
      continue;
    }
    const HeadView key = key_head_of(params.key, params.heads, batch, key_head, call.pages);
    const int64_t count = clip_count(first_key, visibility.seqlen_k, shape.key_stride);
    const auto read_key = [&](int64_t r) {
      key.read(first_key + r, row);
      if (visibility.row_bounds.data && !is_finite(row, head_dim) &&
          !seen_by_group(visibility, group, batch, key_head, first_key + r)) {
        for (int64_t d = 0; d < head_dim; ++d) row[d] = std::isfinite(row[d]) ? row[d] : 0;
      }
    };
    memset(sum, 0, head_dim * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      read_key(r);
      for (int64_t d = 0; d < head_dim; ++d) sum[d] += row[d];
    }
    if (params.sampling.spread == 0 && cached == nullptr) continue;
    const float variance =
        variance_of(sum, count, shape.key_stride, head_dim, read_key, row, scratch.squares);
    if (call.scores_wanted && params.sampling.spread > 0) pooled.variances[i] = variance;
    if (cached) {
      if (cached != sum) memcpy(cached, sum, head_dim * sizeof(float));
      cached[head_dim] = variance;
    }
  }
}

// The sampled queries of one strip: column c is token first_token + c * stride. Under the diagonal
// it sees the strides up to last_stride_seen; -1 in columns past the sequence.
struct SampledQueries {
  int64_t first_token, last_token;  // last_token < first_token: none
  int64_t count;
  alignas(64) int32_t token[kStrip];
  alignas(64) int32_t last_stride_seen[kStrip];

  SampledQueries(const EstimateParams& params, const EstimateShape& shape, int64_t head,
                 int64_t first_sample) {
    const Visibility& visibility = params.visibility;
    const int64_t phase = (params.sampling.head_offset + head) % shape.stride;
    first_token = first_sample * shape.stride + phase;
    count = first_token < visibility.seqlen_q
                ? ceil_div(visibility.seqlen_q - first_token, shape.stride)
                : 0;
    count = clip_count(0, count, kStrip);
    last_token = first_token + (count - 1) * shape.stride;
    for (int64_t c = 0; c < kStrip; ++c) {
      const int64_t at = first_token + (c < count ? c : 0) * shape.stride;
      const int64_t seen =
          visibility.causal ? (at + visibility.shift()) / shape.key_stride : shape.num_strides - 1;
      token[c] = static_cast<int32_t>(at);
      last_stride_seen[c] = static_cast<int32_t>(c < count ? seen : -1);
    }
  }
};

// What the variance of a stride, of 1, adds to each lane's score: spread / 2 * scale^2 * |q|^2, in
// units of log2. The strip holds q * scale * log2(e) / key_stride.
inline void variance_weights(const EstimateParams& params, const EstimateShape& shape,
                             const float* query_strip, float* weights) {
  const auto key_stride = static_cast<float>(shape.key_stride);
  const float factor = params.sampling.spread / 2 * key_stride * key_stride / kLog2E;
  for (int v = 0; v < kTileVecs; ++v) {
    Vec squares{};
    for (int64_t d = 0; d < params.heads.head_dim; ++d) {
      const Vec q = load(query_strip + d * kStrip + v * kLanes);
      squares += q * q;
    }
    store(weights + v * kLanes, squares * factor);
  }
}

inline void add_spread(int64_t num_strides, const float* weights, const float* variances,
                       float* scores) {
  for (int64_t i = 0; i < num_strides; ++i) {
    for (int v = 0; v < kTileVecs; ++v) {
      float* at = scores + i * kStrip + v * kLanes;
      store(at, load(at) + load(weights + v * kLanes) * variances[i]);
    }
  }
}

// Makes scores -inf where the sampled query does not see the stride.
inline void mask_strides(const SampledQueries& queries, const SpanBounds* bounds,
                         int64_t first_stride, int64_t end_stride, int64_t rows, float* scores) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t j = first_stride + i;
    for (int v = 0; v < kTileVecs; ++v) {
      VecInt hidden = load(queries.last_stride_seen + v * kLanes) < static_cast<int32_t>(j);
      if (j >= end_stride) {
        hidden = splat(-1);
      } else if (bounds != nullptr) {
        const VecInt token = load(queries.token + v * kLanes);
        hidden |= inside(token, splat(bounds[j].lower.max_start), splat(bounds[j].lower.min_end));
        hidden |= inside(token, splat(bounds[j].upper.max_start), splat(bounds[j].upper.min_end));
      }
      hide(scores + i * kStrip + v * kLanes, hidden);
    }
  }
}

inline bool hides_all(const SpanBounds* bounds, int64_t first_stride, int64_t end_stride,
                      int64_t first_token, int64_t last_token) {
  for (int64_t j = first_stride; j < end_stride; ++j) {
    if (!bounds[j].hides(first_token, last_token)) return false;
  }
  return true;
}

// The base of a row that has seen no stride: far below every score, yet far above -1e30, which
// exp2_from takes a hidden score for.
constexpr float kNothingSeen = -1e29f;

// Computes the block sums of one tile of scores, relative to 2^base. The base is the maximum so
// far, rounded to a whole number, so that another division of the strides into tiles changes the
// sums by exact powers of two only: sequences packed into one row select what they would select
// apart.
inline void sum_blocks(int64_t num_blocks, int64_t strides_per_block, const float* scores,
                       float* row_base, float* row_sum, float* block_sums, float* tile_base) {
  for (int v = 0; v < kTileVecs; ++v) {
    const float* column = scores + v * kLanes;
    const Vec old_base = load(row_base + v * kLanes);
    Vec largest = old_base;
    for (int64_t i = 0; i < num_blocks * strides_per_block; ++i)
      largest = max(largest, load(column + i * kStrip));
    const Vec base = round_to_whole(largest);
    Vec sum = load(row_sum + v * kLanes) * exp2(old_base - base);
    for (int64_t block = 0; block < num_blocks; ++block) {
      Vec block_sum{};
      for (int64_t i = block * strides_per_block; i < (block + 1) * strides_per_block; ++i) {
        block_sum += exp2_from(load(column + i * kStrip), base);
      }
      store(block_sums + block * kStrip + v * kLanes, block_sum);
      sum += block_sum;
    }
    store(row_base + v * kLanes, base);
    store(row_sum + v * kLanes, sum);
    store(tile_base + v * kLanes, base);
  }
}

// The base and the sum of rows that have seen no stride: the sink's. A stride counts once for all of
// its keys, so the sink counts as one of so many.
inline void begin_rows(const EstimateParams& params, int64_t head, float* row_base,
                       float* row_sum) {
  const Vec sink = splat(params.sink ? params.sink[head] * kLog2E : kMinusInfinity);
  const Vec base = max(splat(kNothingSeen), round_to_whole(sink));
  const Vec sum = exp2_from(sink, base) / static_cast<float>(params.sampling.key_stride);
  for (int v = 0; v < kTileVecs; ++v) {
    store(row_base + v * kLanes, base);
    store(row_sum + v * kLanes, sum);
  }
}

// Adds one strip of sampled queries to the rows of block_scores from m_block on.
inline void estimate_strip(const EstimateParams& params, const EstimateShape& shape,
                           const PooledKeys& pooled, int64_t batch, int64_t head,
                           int64_t first_sample, const EstimateScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim;
  const SampledQueries queries(params, shape, head, first_sample);
  if (queries.count == 0) return;
  const int64_t key_head =
      batch * params.heads.num_heads_k + head * params.heads.num_heads_k / visibility.num_heads;
  const float* keys = pooled.keys + key_head * shape.num_strides * head_dim;
  const float* variances = pooled.variances + key_head * shape.num_strides;
  const SpanBounds* bounds =
      span_bounds_of(visibility, shape.key_stride, pooled.bounds, batch, head);
  read_strip(key_head_of(params.query, params.heads, batch, head), queries.first_token,
             shape.stride, queries.count,
             params.sampling.softmax_scale * kLog2E / static_cast<float>(shape.key_stride),
             scratch.query_strip, scratch.row_buffer);
  alignas(64) float weights[kStrip] = {};
  if (params.sampling.spread > 0) {
    variance_weights(params, shape, scratch.query_strip, weights);
  }

  alignas(64) float row_base[kStrip], row_sum[kStrip];
  begin_rows(params, head, row_base, row_sum);
  const int64_t end_stride =
      clip_count(0, queries.last_stride_seen[queries.count - 1] + 1, shape.num_strides);
  const int64_t num_tiles = ceil_div(end_stride, kStridesPerTile);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t first_stride = tile * kStridesPerTile;
    const int64_t num_strides = clip_count(first_stride, end_stride, kStridesPerTile);
    const int64_t num_blocks = ceil_div(num_strides, shape.strides_per_block);
    const int64_t rows = round_up(num_blocks * shape.strides_per_block, kTileRows);
    float* block_sums = scratch.block_sums + tile * shape.blocks_per_tile * kStrip;
    float* tile_base = scratch.tile_base + tile * kStrip;
    if (bounds && hides_all(bounds, first_stride, first_stride + num_strides, queries.first_token,
                            queries.last_token)) {
      memset(block_sums, 0, num_blocks * kStrip * sizeof(float));
      memcpy(tile_base, row_base, sizeof(row_base));
      continue;
    }
    multiply<Into::kFresh>(rows, head_dim, keys + first_stride * head_dim, head_dim, 1,
                           scratch.query_strip, scratch.scores);
    if (params.sampling.spread > 0) {
      add_spread(num_strides, weights, variances + first_stride, scratch.scores);
    }
    const bool diagonal = first_stride + rows - 1 > queries.last_stride_seen[0];
    if (diagonal || bounds || queries.count < kStrip || num_strides < rows) {
      mask_strides(queries, bounds, first_stride, end_stride, rows, scratch.scores);
    }
    sum_blocks(num_blocks, shape.strides_per_block, scratch.scores, row_base, row_sum, block_sums,
               tile_base);
  }

  const int64_t lanes_per_row = shape.samples_per_block < kStrip ? shape.samples_per_block : kStrip;
  const int64_t first_m_block = first_sample / shape.samples_per_block;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    alignas(64) float factor[kStrip], share[kStrip];
    for (int v = 0; v < kTileVecs; ++v) {
      const Vec sum = load(row_sum + v * kLanes);
      const Vec relative =
          exp2(load(scratch.tile_base + tile * kStrip + v * kLanes) - load(row_base + v * kLanes));
      store(factor + v * kLanes, sum == 0.f ? Vec{} : relative / sum);
    }
    const int64_t end_block = ceil_div(end_stride, shape.strides_per_block);
    const int64_t first_block = tile * shape.blocks_per_tile;
    for (int64_t n_block = first_block;
         n_block < end_block && n_block < first_block + shape.blocks_per_tile; ++n_block) {
      for (int v = 0; v < kTileVecs; ++v) {
        store(share + v * kLanes,
              load(scratch.block_sums + n_block * kStrip + v * kLanes) * load(factor + v * kLanes));
      }
      for (int64_t c = 0; c < queries.count; c += lanes_per_row) {
        const int64_t m_block = first_m_block + c / lanes_per_row;
        float sum = 0;
        for (int64_t lane = c; lane < c + lanes_per_row; ++lane) sum += share[lane];
        params.block_scores[((batch * visibility.num_heads + head) * visibility.num_m_blocks() +
                             m_block) *
                                visibility.num_n_blocks() +
                            n_block] += sum;
      }
    }
  }
}

// The parameters of the call with the most keys, whose scratch is large enough for all.
inline const EstimateParams& longest_of(const Calls<EstimateCall>& calls) {
  const EstimateCall* longest = calls.first;
  for (int64_t c = 1; c < calls.count; ++c) {
    if (calls[c].params.visibility.seqlen_k > longest->params.visibility.seqlen_k)
      longest = &calls[c];
  }
  return longest->params;
}

// Query blocks that are worked on together, for the rows of the queue.
inline int64_t num_rows_of(const EstimateCall& call) {
  const EstimateShape shape(call.params);
  return call.scores_wanted
             ? ceil_div(call.params.visibility.num_m_blocks(), shape.m_blocks_per_item)
             : 0;
}

inline int64_t estimate_workspace_bytes(const Calls<EstimateCall>& calls) {
  const EstimateParams& longest = longest_of(calls);
  Arena arena;
  take_for_each<PooledKeys>(arena, calls);
  WorkQueue(arena, calls, EstimateShape(longest).m_blocks_per_item, num_rows_of);
  return workspace_bytes<EstimateScratch>(arena, longest);
}

inline void run_estimate(const Calls<EstimateCall>& calls) {
  const EstimateParams& longest = longest_of(calls);
  const EstimateShape all(longest);  // of what the calls have in common
  const Heads& heads = longest.heads;
  const int num_threads = longest.execution.num_threads;
  Arena arena(longest.execution.workspace);
  const PooledKeys* pooled = take_for_each<PooledKeys>(arena, calls);
  const WorkQueue queue(arena, calls, all.m_blocks_per_item, num_rows_of);

  const auto num_pooled = [&](int64_t c) {
    if (!calls[c].scores_wanted && calls[c].pooled.data == nullptr) return int64_t{0};
    return calls[c].params.visibility.batch * heads.num_heads_k *
           EstimateShape(calls[c].params).num_strides;
  };
  parallel_for_calls(num_threads, calls.count, num_pooled,
                     grain_for(all.key_stride * heads.head_dim),
                     [&](int thread, int64_t c, int64_t begin, int64_t end) {
                       pool_strides(calls[c], pooled[c], begin, end,
                                    thread_scratch<EstimateScratch>(arena, longest, thread));
                     });
  for (int64_t c = 0; c < calls.count; ++c) {
    const Visibility& visibility = calls[c].params.visibility;
    compute_span_bounds(visibility, all.key_stride, num_threads, pooled[c].bounds);
    if (!calls[c].scores_wanted) continue;
    memset(calls[c].params.block_scores, 0,
           visibility.num_mask_rows() * visibility.num_n_blocks() * sizeof(float));
  }

  const int64_t num_heads = longest.visibility.batch * longest.visibility.num_heads;
  const auto estimate_items = [&](int thread, int64_t begin, int64_t end) {
    const EstimateScratch scratch = thread_scratch<EstimateScratch>(arena, longest, thread);
    for (int64_t item = begin; item < end; ++item) {
      const WorkRow& row = queue.rows[item / num_heads];
      const EstimateParams& params = calls[row.call].params;
      const EstimateShape shape(params);
      const int64_t head = item % num_heads;
      const int64_t first_sample = row.row * shape.m_blocks_per_item * shape.samples_per_block;
      for (int64_t strip = 0; strip < shape.strips_per_item; ++strip) {
        estimate_strip(params, shape, pooled[row.call], head / params.visibility.num_heads,
                       head % params.visibility.num_heads, first_sample + strip * kStrip, scratch);
      }
    }
  };
  // A row's pairs of queries and keys, in samples and strides.
  const int64_t products = queue.work() / (all.stride * all.key_stride) / (queue.count + 1);
  parallel_for(num_threads, num_heads * queue.count, grain_for(products * heads.head_dim),
               estimate_items);
}

}  // namespace rrattn::cpu::RRATTN_SIMD
