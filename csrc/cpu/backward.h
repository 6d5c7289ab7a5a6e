// Gradients of block-sparse flash attention on the CPU.
//
//   P = exp(S - lse),  dP = dO V^T,  delta = rowsum(dO * O) - dlse,  dS = P * (dP - delta)
//   dV = P^T dO,  dQ = softmax_scale * dS K,  dK = softmax_scale * dS^T Q
//   dsink = -sum(exp(sink - lse) * delta)
//
// There are two walks over the selected tiles, and each owns what it writes. The walk of a query
// block (lanes are queries, keys stream past) gives dQ. The walk of a key block (lanes are keys,
// queries stream past) gives dK and dV, summed over the heads of the group. So S and dP are
// computed twice: 7 products instead of 5. In exchange threads share nothing, so the result does
// not depend on their number, and no L x L or per-thread L x D buffer is needed.
#pragma once

#include "masking.h"

namespace rrattn::cpu::RRATTN_SIMD {

// Buffers of either walk: strips of the side that stays, the sums of the walk, and tiles of the
// side that streams past.
struct BackwardScratch {
  float *still_a, *still_b;  // [kStrips][D][kStrip] and [kStrips][Dv][kStrip]: Q and dO, or K and V
  float *sum_a, *sum_b;      // the same: dQ and none, or dK and dV
  float *stream_a, *stream_b;  // [kBlockSize][D] and [kBlockSize][Dv]: K and V, or Q and dO
  float *scores, *grad;        // [kBlockSize][kStrip]: S then P, dP then dS
  float* row_buffer;           // [D] or [Dv]

  BackwardScratch(Arena& arena, const BackwardParams& params)
      : BackwardScratch(arena, params.heads) {}
  BackwardScratch(Arena& arena, const Heads& heads)
      : still_a(arena.take<float>(kBlockSize * heads.head_dim)),
        still_b(arena.take<float>(kBlockSize * heads.head_dim_v)),
        sum_a(arena.take<float>(kBlockSize * heads.head_dim)),
        sum_b(arena.take<float>(kBlockSize * heads.head_dim_v)),
        stream_a(arena.take<float>(kBlockSize * heads.head_dim)),
        stream_b(arena.take<float>(kBlockSize * heads.head_dim_v)),
        scores(arena.take<float>(kBlockSize * kStrip)),
        grad(arena.take<float>(kBlockSize * kStrip)),
        row_buffer(arena.take<float>(largest_head_dim(heads))) {}
};

// What the forward softmax left for each query, [B, Hq, Lq]: lse (+inf where nothing was visible,
// which makes every probability 0), and delta.
struct SoftmaxState {
  float *lse, *delta;
  SoftmaxState(Arena& arena, const Visibility& visibility)
      : lse(arena.take<float>(visibility.batch * visibility.num_heads * visibility.seqlen_q)),
        delta(arena.take<float>(visibility.batch * visibility.num_heads * visibility.seqlen_q)) {}
};

inline void compute_softmax_state(const BackwardParams& params, const SoftmaxState& state,
                                  const Arena& arena) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim_v = params.heads.head_dim_v;
  const auto compute_rows = [&](int thread, int64_t begin, int64_t end) {
    const BackwardScratch scratch = thread_scratch<BackwardScratch>(arena, params, thread);
    float *out_row = scratch.row_buffer, *grad_row = scratch.stream_b;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % visibility.seqlen_q,
                    head = i / visibility.seqlen_q % visibility.num_heads;
      const int64_t batch = i / visibility.seqlen_q / visibility.num_heads;
      value_head_of(params.out, params.heads, batch, head).read(row, out_row);
      value_head_of(params.grad_out, params.heads, batch, head).read(row, grad_row);
      float delta = 0;
      for (int64_t d = 0; d < head_dim_v; ++d) delta += out_row[d] * grad_row[d];
      if (params.grad_lse.data) delta -= params.grad_lse.at(batch, head, row);
      const bool nothing_visible = params.lse[i] == kMinusInfinity;
      state.lse[i] = nothing_visible ? -kMinusInfinity : params.lse[i];
      state.delta[i] = nothing_visible ? 0 : delta;
    }
  };
  parallel_for(params.execution.num_threads,
               visibility.batch * visibility.num_heads * visibility.seqlen_q, grain_for(head_dim_v),
               compute_rows);
}

// The gradients of the sinks. One thread sums all rows of a head, so their order is always the same.
inline void compute_grad_sink(const BackwardParams& params, const SoftmaxState& state) {
  const Visibility& visibility = params.visibility;
  const auto sum_heads = [&](int, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < visibility.batch; ++batch) {
        const int64_t first = (batch * visibility.num_heads + head) * visibility.seqlen_q;
        for (int64_t i = first; i < first + visibility.seqlen_q; ++i) {
          sum -= __builtin_expf(params.sink[head] - state.lse[i]) * state.delta[i];
        }
      }
      params.grad_sink[head] = static_cast<float>(sum);
    }
  };
  parallel_for(params.execution.num_threads, visibility.num_heads,
               grain_for(8 * visibility.batch * visibility.seqlen_q), sum_heads);
}

// Turns grad, which holds dP, into dS, given lse and delta of each column.
inline void softmax_gradient_by_column(int64_t rows, const float* lse, const float* delta,
                                       float* scores, float* grad) {
  for (int64_t i = 0; i < rows * kStrip; i += kLanes) {
    const Vec p = exp2((load(scores + i) - load(lse + i % kStrip)) * kLog2E);
    store(grad + i, p * (load(grad + i) - load(delta + i % kStrip)));
  }
}

// The same, given lse and delta of each row. It also turns scores into P, for dV. Where P is 0, dS
// is made 0 as well: for a hidden key dP may be NaN.
inline void softmax_gradient_by_row(int64_t rows, const float* lse, const float* delta,
                                    float* scores, float* grad) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = r * kStrip; i < (r + 1) * kStrip; i += kLanes) {
      const Vec p = exp2((load(scores + i) - lse[r]) * kLog2E);
      store(scores + i, p);
      store(grad + i, p == 0 ? Vec{} : p * (load(grad + i) - delta[r]));
    }
  }
}

inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Computes dQ of one query block of one head.
inline void grad_query_item(const BackwardParams& params, const SpanBounds* block_bounds,
                            const SoftmaxState& state, int64_t batch, int64_t head, int64_t m_block,
                            const BackwardScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim, head_dim_v = params.heads.head_dim_v;
  const int64_t key_head = head * params.heads.num_heads_k / visibility.num_heads;
  const int64_t first_query = m_block * kBlockSize;
  const int64_t num_queries = clip_count(first_query, visibility.seqlen_q, kBlockSize);
  const HeadMask mask(visibility, block_bounds, batch, head);
  const HeadView key = key_head_of(params.key, params.heads, batch, key_head);
  const HeadView value = value_head_of(params.value, params.heads, batch, key_head);
  const HeadView query = key_head_of(params.query, params.heads, batch, head);
  const HeadView grad_out = value_head_of(params.grad_out, params.heads, batch, head);
  const uint32_t* mask_row =
      params.block_mask +
      ((batch * visibility.num_heads + head) * visibility.num_m_blocks() + m_block) *
          visibility.num_mask_words();

  alignas(64) float lse[kBlockSize], delta[kBlockSize];
  const int64_t state_row =
      (batch * visibility.num_heads + head) * visibility.seqlen_q + first_query;
  memcpy(lse, state.lse + state_row, num_queries * sizeof(float));
  memcpy(delta, state.delta + state_row, num_queries * sizeof(float));
  fill(lse + num_queries, kBlockSize - num_queries, -kMinusInfinity);
  fill(delta + num_queries, kBlockSize - num_queries, 0);
  for (int64_t c = 0; c < num_queries; c += kStrip) {
    const int64_t columns = clip_count(c, num_queries, kStrip);
    read_strip(query, first_query + c, 1, columns, params.softmax_scale,
               scratch.still_a + c * head_dim, scratch.row_buffer);
    read_strip(grad_out, first_query + c, 1, columns, 1, scratch.still_b + c * head_dim_v,
               scratch.row_buffer);
  }
  memset(scratch.sum_a, 0, kBlockSize * head_dim * sizeof(float));

  for (int64_t n_block = 0; n_block < visibility.num_n_blocks(); ++n_block) {
    if (!selected(mask_row, n_block)) continue;
    const BlockKind kind = mask.kind(m_block, n_block);
    if (kind == BlockKind::kHidden) continue;
    const bool flash_mask = kind == BlockKind::kPartial;
    const int64_t first_key = n_block * kBlockSize;
    read_tile(key, first_key, clip_count(first_key, visibility.seqlen_k, kBlockSize),
              scratch.stream_a);
    read_tile(value, first_key, clip_count(first_key, visibility.seqlen_k, kBlockSize),
              scratch.stream_b);
    clear_unseen_keys(mask, kind, m_block, n_block,
                      {{scratch.stream_a, head_dim}, {scratch.stream_b, head_dim_v}});
    for (int64_t c = 0; c < num_queries; c += kStrip) {
      const int64_t strip_query = first_query + c;
      const int64_t last_query = strip_query + clip_count(c, num_queries, kStrip) - 1;
      const int64_t end_key =
          visibility.causal ? last_query + visibility.shift() + 1 : visibility.seqlen_k;
      const int64_t num_keys = round_up(clip_count(first_key, end_key, kBlockSize), kTileRows);
      multiply<Into::kFresh>(num_keys, head_dim, scratch.stream_a, head_dim, 1,
                             scratch.still_a + c * head_dim, scratch.scores);
      multiply<Into::kFresh>(num_keys, head_dim_v, scratch.stream_b, head_dim_v, 1,
                             scratch.still_b + c * head_dim_v, scratch.grad);
      const bool diagonal =
          visibility.causal && first_key + num_keys - 1 > strip_query + visibility.shift();
      if (diagonal || flash_mask || first_key + num_keys > visibility.seqlen_k) {
        mask_keys_by_queries(mask, flash_mask, first_key, num_keys, strip_query, scratch.scores);
      }
      softmax_gradient_by_column(num_keys, lse + c, delta + c, scratch.scores, scratch.grad);
      multiply<Into::kSum>(head_dim, num_keys, scratch.stream_a, 1, head_dim, scratch.grad,
                           scratch.sum_a + c * head_dim);
    }
  }

  alignas(64) float scale[kStrip];
  fill(scale, kStrip, params.softmax_scale);
  const HeadView grad_query = key_head_of(params.grad_query, params.heads, batch, head);
  for (int64_t c = 0; c < num_queries; c += kStrip) {
    write_strip(grad_query, first_query + c, clip_count(c, num_queries, kStrip),
                scratch.sum_a + c * head_dim, scale, scratch.row_buffer);
  }
}

// Adds the share of one query block of one head to dK and dV of one key block.
inline void grad_key_value_tile(const BackwardParams& params, const HeadMask& mask, bool flash_mask,
                                const SoftmaxState& state, int64_t batch, int64_t head,
                                int64_t m_block, int64_t n_block, const BackwardScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim, head_dim_v = params.heads.head_dim_v;
  const int64_t first_query = m_block * kBlockSize, first_key = n_block * kBlockSize;
  const int64_t num_queries = clip_count(first_query, visibility.seqlen_q, kBlockSize);
  const int64_t num_keys = clip_count(first_key, visibility.seqlen_k, kBlockSize);
  read_tile(key_head_of(params.query, params.heads, batch, head), first_query, num_queries,
            scratch.stream_a);
  read_tile(value_head_of(params.grad_out, params.heads, batch, head), first_query, num_queries,
            scratch.stream_b);

  float lse[kBlockSize], delta[kBlockSize];
  const int64_t state_row =
      (batch * visibility.num_heads + head) * visibility.seqlen_q + first_query;
  memcpy(lse, state.lse + state_row, num_queries * sizeof(float));
  memcpy(delta, state.delta + state_row, num_queries * sizeof(float));
  fill(lse + num_queries, kBlockSize - num_queries, -kMinusInfinity);
  fill(delta + num_queries, kBlockSize - num_queries, 0);

  for (int64_t c = 0; c < num_keys; c += kStrip) {
    // Queries before `skipped` lie wholly above the diagonal of this strip.
    const int64_t first_seeing =
        visibility.causal ? first_key + c - visibility.shift() - first_query : 0;
    const int64_t skipped = clip_count(0, first_seeing, kBlockSize) / kTileRows * kTileRows;
    const int64_t rows = round_up(num_queries, kTileRows) - skipped;
    if (rows <= 0) continue;
    const float* query_tile = scratch.stream_a + skipped * head_dim;
    const float* grad_out_tile = scratch.stream_b + skipped * head_dim_v;
    multiply<Into::kFresh>(rows, head_dim, query_tile, head_dim, 1, scratch.still_a + c * head_dim,
                           scratch.scores);
    multiply<Into::kFresh>(rows, head_dim_v, grad_out_tile, head_dim_v, 1,
                           scratch.still_b + c * head_dim_v, scratch.grad);
    const bool diagonal = visibility.causal &&
                          first_key + c + kStrip - 1 > first_query + skipped + visibility.shift();
    if (diagonal || flash_mask) {
      mask_queries_by_keys(mask, flash_mask, first_query + skipped, rows, first_key + c,
                           scratch.scores);
    }
    softmax_gradient_by_row(rows, lse + skipped, delta + skipped, scratch.scores, scratch.grad);
    multiply<Into::kSum>(head_dim, rows, query_tile, 1, head_dim, scratch.grad,
                         scratch.sum_a + c * head_dim);
    multiply<Into::kSum>(head_dim_v, rows, grad_out_tile, 1, head_dim_v, scratch.scores,
                         scratch.sum_b + c * head_dim_v);
  }
}

// Computes dK and dV of one key block of one key head, over all query heads of its group.
inline void grad_key_value_item(const BackwardParams& params, const SpanBounds* block_bounds,
                                const SoftmaxState& state, int64_t batch, int64_t key_head,
                                int64_t n_block, const BackwardScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim = params.heads.head_dim, head_dim_v = params.heads.head_dim_v;
  const int64_t group = visibility.num_heads / params.heads.num_heads_k;
  const int64_t first_key = n_block * kBlockSize;
  const int64_t num_keys = clip_count(first_key, visibility.seqlen_k, kBlockSize);
  const HeadView key = key_head_of(params.key, params.heads, batch, key_head);
  const HeadView value = value_head_of(params.value, params.heads, batch, key_head);
  for (int64_t c = 0; c < num_keys; c += kStrip) {
    const int64_t columns = clip_count(c, num_keys, kStrip);
    read_strip(key, first_key + c, 1, columns, params.softmax_scale, scratch.still_a + c * head_dim,
               scratch.row_buffer);
    read_strip(value, first_key + c, 1, columns, 1, scratch.still_b + c * head_dim_v,
               scratch.row_buffer);
  }
  memset(scratch.sum_a, 0, kBlockSize * head_dim * sizeof(float));
  memset(scratch.sum_b, 0, kBlockSize * head_dim_v * sizeof(float));

  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    const HeadMask mask(visibility, block_bounds, batch, head);
    for (int64_t m_block = 0; m_block < visibility.num_m_blocks(); ++m_block) {
      const uint32_t* mask_row =
          params.block_mask +
          ((batch * visibility.num_heads + head) * visibility.num_m_blocks() + m_block) *
              visibility.num_mask_words();
      if (!selected(mask_row, n_block)) continue;
      const BlockKind kind = mask.kind(m_block, n_block);
      if (kind == BlockKind::kHidden) continue;
      grad_key_value_tile(params, mask, kind == BlockKind::kPartial, state, batch, head, m_block,
                          n_block, scratch);
    }
  }

  alignas(64) float scale[kStrip], one[kStrip];
  fill(scale, kStrip, params.softmax_scale);
  fill(one, kStrip, 1);
  const HeadView grad_key = key_head_of(params.grad_key, params.heads, batch, key_head);
  const HeadView grad_value = value_head_of(params.grad_value, params.heads, batch, key_head);
  for (int64_t c = 0; c < num_keys; c += kStrip) {
    const int64_t columns = clip_count(c, num_keys, kStrip);
    write_strip(grad_key, first_key + c, columns, scratch.sum_a + c * head_dim, scale,
                scratch.row_buffer);
    write_strip(grad_value, first_key + c, columns, scratch.sum_b + c * head_dim_v, one,
                scratch.row_buffer);
  }
}

inline int64_t backward_workspace_bytes(const BackwardParams& params) {
  Arena arena;
  arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize));
  SoftmaxState(arena, params.visibility);
  return workspace_bytes<BackwardScratch>(arena, params);
}

inline void run_backward(const BackwardParams& params) {
  const Visibility& visibility = params.visibility;
  const int num_threads = params.execution.num_threads;
  Arena arena(params.execution.workspace);
  SpanBounds* block_bounds = arena.take<SpanBounds>(visibility.num_span_bounds(kBlockSize));
  const SoftmaxState state(arena, visibility);
  compute_span_bounds(visibility, kBlockSize, num_threads, block_bounds);
  compute_softmax_state(params, state, arena);
  if (params.sink) compute_grad_sink(params, state);

  const int64_t query_heads = visibility.batch * visibility.num_heads;
  const int64_t key_heads = visibility.batch * params.heads.num_heads_k;
  const int64_t query_items = query_heads * visibility.num_m_blocks();
  const int64_t key_items = key_heads * visibility.num_n_blocks();
  const auto compute_items = [&](int thread, int64_t begin, int64_t end) {
    const BackwardScratch scratch = thread_scratch<BackwardScratch>(arena, params, thread);
    for (int64_t item = begin; item < end; ++item) {
      if (item < query_items) {
        // From the last query block to the first: under the diagonal the longest come first.
        const int64_t m_block = visibility.num_m_blocks() - 1 - item / query_heads;
        grad_query_item(params, block_bounds, state, item % query_heads / visibility.num_heads,
                        item % visibility.num_heads, m_block, scratch);
      } else {
        const int64_t key_item = item - query_items, key_head = key_item % key_heads;
        grad_key_value_item(params, block_bounds, state, key_head / params.heads.num_heads_k,
                            key_head % params.heads.num_heads_k, key_item / key_heads, scratch);
      }
    }
  };
  parallel_for(num_threads, query_items + key_items, 1, compute_items);
}

}  // namespace rrattn::cpu::RRATTN_SIMD
