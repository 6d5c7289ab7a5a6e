// Block-sparse attention in eight bits on the CPU: INT8 products of queries and keys, FP8 products
// of probabilities and values, as ../core/quantization.h and docs/quantization.md say.
//
// It runs the loops of attend.h on whole numbers and e4m3 numbers in float32. A sum of 256 products
// of INT8 numbers is below 2^23, so float32 has it exactly, as int32 would.
#pragma once

#include "../core/quantization.h"
#include "attend.h"

namespace rrattn::cpu::RRATTN_SIMD {

// 1.5 * 2^23 times an eighth: a number that this times its power of two is added to loses all bits
// but the four leading ones, rounded to nearest even.
constexpr float kE4m3Rounder = kRounder / 8;

// The nearest e4m3 number, of numbers from 0 to kLargestE4m3 and NaN.
RRATTN_INLINE Vec round_to_e4m3(Vec x) {
  const Vec power = max((Vec)((VecInt)x & 0x7f800000), splat(kSmallestNormalE4m3));
  const Vec rounder = power * kE4m3Rounder;
  return (x + rounder) - rounder;
}

// The same of one number of either sign.
RRATTN_INLINE float round_to_e4m3(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7f800000;
  float power;
  memcpy(&power, &bits, sizeof(power));
  power = power < kSmallestNormalE4m3 ? kSmallestNormalE4m3 : power;
  const float rounder = power * kE4m3Rounder;
  return (x + rounder) - rounder;
}

RRATTN_INLINE Vec round_up_to_whole(Vec x) {
  const Vec whole = round_to_whole(x);
  return whole < x ? whole + 1.f : whole;
}

RRATTN_INLINE bool is_finite(float x) { return x - x == 0; }

// The largest magnitude of a row; infinite where one of its elements is infinite or NaN.
RRATTN_INLINE float largest_of(const float* row, int64_t count) {
  float largest = 0;
  bool finite = true;
  for (int64_t d = 0; d < count; ++d) {
    const float magnitude = __builtin_fabsf(row[d]);
    largest = magnitude > largest ? magnitude : largest;
    finite &= is_finite(magnitude);
  }
  return finite ? largest : __builtin_huge_valf();
}

// Multiplies a query or key by a Hadamard matrix over the number of elements that it takes together, which
// leaves products of both what they were, over that number. What one element has more than the others
// all of them share then, so that INT8 has more bits of them. No element becomes larger than the largest.
RRATTN_INLINE void rotate(float* row, int64_t head_dim) {
  const int64_t together = rotated_together(head_dim);
  const float inverse = 1.f / static_cast<float>(together);
  for (int64_t d = 0; d < head_dim; ++d) row[d] *= inverse;
  for (int64_t step = 1; step < together; step *= 2) {
    for (int64_t first = 0; first < head_dim; first += 2 * step) {
      for (int64_t d = first; d < first + step; ++d) {
        const float a = row[d], b = row[d + step];
        row[d] = a + b;
        row[d + step] = a - b;
      }
    }
  }
}

// The product is rounded before it becomes a whole number, as the oracle's is: halves are frequent,
// as of an element that is half of the largest. A sum in place of rintf might become one
// multiply-add, which does not round the product.
RRATTN_INLINE void round_to_int8(float* row, int64_t count, float inverse) {
  for (int64_t d = 0; d < count; ++d) row[d] = __builtin_rintf(row[d] * inverse);
}

// What is known of each key head, over all batch entries, before its blocks are read.
struct KeyHeadScales {
  float* mean_key;     // [B, Hkv, D], which is subtracted from its keys
  float* value_scale;  // [B, Hkv, Dv], powers of two that its values are divided by
  int64_t head_dim, head_dim_v;

  KeyHeadScales(Arena& arena, const AttendParams& params)
      : mean_key(arena.take<float>(num_heads(params) * params.heads.head_dim)),
        value_scale(arena.take<float>(num_heads(params) * params.heads.head_dim_v)),
        head_dim(params.heads.head_dim),
        head_dim_v(params.heads.head_dim_v) {}

  float* mean_key_of(int64_t head) const { return mean_key + head * head_dim; }
  float* value_scale_of(int64_t head) const { return value_scale + head * head_dim_v; }

  static int64_t num_heads(const AttendParams& params) {
    return params.visibility.batch * params.heads.num_heads_k;
  }
};

struct QuantizedScratch : AttendScratch {
  float* query_scale;  // [kHeadsPerItem][kBlockSize], of a row's INT8 numbers in the exponent of 2
  float* mean_score;   // [kHeadsPerItem][kBlockSize], of the mean key, to be added to lse
  double* mean_sum;    // [D]
  float* largest_values;  // [Dv]
  float key_scale = 0;    // of the block in key_tile

  QuantizedScratch(Arena& arena, const AttendParams& params)
      : AttendScratch(arena, params),
        query_scale(arena.take<float>(kHeadsPerItem * kBlockSize)),
        mean_score(arena.take<float>(kHeadsPerItem * kBlockSize)),
        mean_sum(arena.take<double>(params.heads.head_dim)),
        largest_values(arena.take<float>(params.heads.head_dim_v)) {}
};

// The mean of the keys that a query sees, of the first block that has any, without those that are
// not finite; zeros where there is none. It is of one block, so that it is the same for a chunk of
// the queries and the keys so far as for the whole.
inline void compute_mean_key(const AttendParams& params, int64_t batch, int64_t key_head,
                             float* mean, QuantizedScratch& scratch) {
  const int64_t head_dim = params.heads.head_dim, seqlen_k = params.visibility.seqlen_k;
  const HeadView key = key_head_of(params.key, params.heads, batch, key_head);
  for (int64_t d = 0; d < head_dim; ++d) mean[d] = scratch.mean_sum[d] = 0;
  int64_t end = seqlen_k, count = 0;
  for (int64_t row = 0; row < end; ++row) {
    if (!seen_by_group(params.visibility, group_size(params), batch, key_head, row)) continue;
    key.read(row, scratch.row_buffer);
    if (!is_finite(largest_of(scratch.row_buffer, head_dim))) continue;
    if (count++ == 0) end = row + clip_count(row, seqlen_k, kBlockSize - row % kBlockSize);
    for (int64_t d = 0; d < head_dim; ++d) scratch.mean_sum[d] += scratch.row_buffer[d];
  }
  for (int64_t d = 0; d < head_dim && count; ++d) {
    mean[d] = static_cast<float>(scratch.mean_sum[d] / static_cast<double>(count));
  }
}

// Powers of two that bring the values that a query sees, if they are finite, into the range of e4m3.
inline void compute_value_scale(const AttendParams& params, int64_t batch, int64_t key_head,
                                float* scale, QuantizedScratch& scratch) {
  const int64_t head_dim = params.heads.head_dim_v;
  const HeadView value = value_head_of(params.value, params.heads, batch, key_head);
  float* largest = scratch.largest_values;
  memset(largest, 0, head_dim * sizeof(float));
  for (int64_t row = 0; row < params.visibility.seqlen_k; ++row) {
    if (!seen_by_group(params.visibility, group_size(params), batch, key_head, row)) continue;
    value.read(row, scratch.row_buffer);
    for (int64_t d = 0; d < head_dim; ++d) {
      const float magnitude = __builtin_fabsf(scratch.row_buffer[d]);
      largest[d] = is_finite(magnitude) && magnitude > largest[d] ? magnitude : largest[d];
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) scale[d] = __builtin_ldexpf(1, value_exponent(largest[d]));
}

// The tiles of a block: whole numbers of the keys, less their mean, and e4m3 numbers of the values.
// What no query sees is zero. A key that is not finite is zero too, and its value NaN instead, which
// shows in all queries that it does not have to be cleared for.
inline void read_quantized_tiles(const AttendParams& params, const KeyHeadScales& scales,
                                 const AttendItem& item, int64_t first_key, int64_t num_keys,
                                 QuantizedScratch& scratch) {
  const Heads& heads = params.heads;
  const int64_t head_dim = heads.head_dim, head_dim_v = heads.head_dim_v;
  const int64_t head = item.batch * heads.num_heads_k + item.key_head;
  const HeadView key = key_head_of(params.key, heads, item.batch, item.key_head);
  const HeadView value = value_head_of(params.value, heads, item.batch, item.key_head);
  const float *mean = scales.mean_key_of(head), *value_scale = scales.value_scale_of(head);
  memset(scratch.key_tile, 0, kBlockSize * head_dim * sizeof(float));
  memset(scratch.value_tile, 0, kBlockSize * head_dim_v * sizeof(float));
  float largest = 0;
  for (int64_t r = 0; r < num_keys; ++r) {
    if (!seen_by_group(params.visibility, group_size(params), item.batch, item.key_head,
                       first_key + r))
      continue;
    float *key_row = scratch.key_tile + r * head_dim,
          *value_row = scratch.value_tile + r * head_dim_v;
    key.read(first_key + r, key_row);
    for (int64_t d = 0; d < head_dim; ++d) key_row[d] -= mean[d];
    if (!is_finite(largest_of(key_row, head_dim))) {
      memset(key_row, 0, head_dim * sizeof(float));
      for (int64_t d = 0; d < head_dim_v; ++d) value_row[d] = __builtin_nanf("");
      continue;
    }
    rotate(key_row, head_dim);
    const float largest_of_key = largest_of(key_row, head_dim);
    largest = largest_of_key > largest ? largest_of_key : largest;
    value.read(first_key + r, value_row);
    for (int64_t d = 0; d < head_dim_v; ++d) {
      value_row[d] = round_to_e4m3(value_row[d] / value_scale[d]);
    }
  }
  const Int8Scale key_scale(largest, 1);
  round_to_int8(scratch.key_tile, num_keys * head_dim, key_scale.inverse);
  scratch.key_scale = key_scale.scale;
}

// The queries of a head as whole numbers, their scales, and their scores of the mean key. A row that
// is not finite is zero and has a scale of NaN, which makes its scores NaN.
inline void read_quantized_queries(const AttendParams& params, const KeyHeadScales& scales,
                                   const AttendItem& item, int64_t slot,
                                   QuantizedScratch& scratch) {
  const int64_t head_dim = params.heads.head_dim, first_query = item.m_block * kBlockSize;
  const HeadView query =
      key_head_of(params.query, params.heads, item.batch, item.first_head + slot);
  const float* mean = scales.mean_key_of(item.batch * params.heads.num_heads_k + item.key_head);
  float* strips = scratch.query_strips + slot * kBlockSize * head_dim;
  float* row = scratch.row_buffer;
  memset(strips, 0, kBlockSize * head_dim * sizeof(float));
  const int64_t num_queries = clip_count(first_query, params.visibility.seqlen_q, kBlockSize);
  const float factor =
      params.softmax_scale * kLog2E * static_cast<float>(rotated_together(head_dim));
  for (int64_t c = 0; c < kBlockSize; ++c) {
    float& scale = scratch.query_scale[slot * kBlockSize + c];
    float& mean_score = scratch.mean_score[slot * kBlockSize + c];
    scale = mean_score = 0;
    if (c >= num_queries) continue;
    query.read(first_query + c, row);
    double product = 0;
    for (int64_t d = 0; d < head_dim; ++d) product += static_cast<double>(row[d]) * mean[d];
    const float score = static_cast<float>(product * params.softmax_scale);
    if (!is_finite(largest_of(row, head_dim)) || !is_finite(score)) {
      scale = __builtin_nanf("");
      continue;
    }
    mean_score = score;
    rotate(row, head_dim);
    const Int8Scale row_scale(largest_of(row, head_dim), factor);
    round_to_int8(row, head_dim, row_scale.inverse);
    scale = row_scale.scale;
    float* column = strips + c / kStrip * kStrip * head_dim + c % kStrip;
    for (int64_t d = 0; d < head_dim; ++d) column[d * kStrip] = row[d];
  }
}

// As softmax_step, of scores that are exponents of 2: the base of a row is a whole number, and its
// probabilities are e4m3 numbers, of 256 times what they are.
inline void quantized_softmax_step(int64_t num_keys, float* scores, float* row_base, float* row_sum,
                                   float* rescale) {
  for (int v = 0; v < kTileVecs; ++v) {
    float* column = scores + v * kLanes;
    Vec largest = splat(kMinusInfinity);
    for (int64_t i = 0; i < num_keys; ++i) largest = max(largest, load(column + i * kStrip));
    const Vec old_base = load(row_base + v * kLanes);
    const Vec new_base = max(old_base, round_up_to_whole(largest));
    // Where nothing is seen yet, a base of 0 keeps -inf - base at -inf.
    const Vec base = new_base == kMinusInfinity ? Vec{} : new_base;
    Vec sum{};
    for (int64_t i = 0; i < num_keys; ++i) {
      const Vec p = round_to_e4m3(exp2_from(load(column + i * kStrip), base) * kProbabilityScale);
      store(column + i * kStrip, p);
      sum += p;
    }
    const Vec factor = exp2(old_base - base);  // a power of two, or 0
    store(rescale + v * kLanes, factor);
    store(row_base + v * kLanes, new_base);
    store(row_sum + v * kLanes, load(row_sum + v * kLanes) * factor + sum);
  }
}

inline void attend_quantized_item(const AttendParams& params, const SpanBounds* block_bounds,
                                  const KeyHeadScales& scales, const AttendItem& item,
                                  QuantizedScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t head_dim_v = params.heads.head_dim_v;
  const int64_t first_query = item.m_block * kBlockSize;
  const int64_t num_queries = clip_count(first_query, visibility.seqlen_q, kBlockSize);
  constexpr float kLn2 = 1 / kLog2E;

  for (int64_t slot = 0; slot < item.num_heads; ++slot) {
    read_quantized_queries(params, scales, item, slot, scratch);
    const float sink = params.sink ? params.sink[item.first_head + slot] : kMinusInfinity;
    for (int64_t i = slot * kBlockSize; i < (slot + 1) * kBlockSize; ++i) {
      // The scores of a row lack that of the mean key, and so does its sink.
      const float score = (sink - scratch.mean_score[i]) * kLog2E;
      const float base = __builtin_ceilf(score);
      scratch.row_max[i] = base;
      scratch.row_sum[i] =
          sink == kMinusInfinity ? 0 : kProbabilityScale * __builtin_exp2f(score - base);
    }
  }
  memset(scratch.out_strips, 0, item.num_heads * kBlockSize * head_dim_v * sizeof(float));

  attend_selected_blocks(
      params, block_bounds, item, scratch,
      [&](int64_t first_key, int64_t num_keys) {
        read_quantized_tiles(params, scales, item, first_key, num_keys, scratch);
      },
      [&](int64_t slot, int64_t column, int64_t num_keys, float* scores) {
        for (int v = 0; v < kTileVecs; ++v) {
          const Vec scale = load(scratch.query_scale + slot * kBlockSize + column + v * kLanes) *
                            scratch.key_scale;
          for (int64_t i = 0; i < num_keys; ++i) {
            float* at = scores + i * kStrip + v * kLanes;
            store(at, load(at) * scale);
          }
        }
      },
      quantized_softmax_step);

  const float* value_scale =
      scales.value_scale_of(item.batch * params.heads.num_heads_k + item.key_head);
  for (int64_t slot = 0; slot < item.num_heads; ++slot) {
    const int64_t head = item.first_head + slot;
    const HeadView out = value_head_of(params.out, params.heads, item.batch, head);
    float* row_base = scratch.row_max + slot * kBlockSize;
    float* row_sum = scratch.row_sum + slot * kBlockSize;
    const float* mean_score = scratch.mean_score + slot * kBlockSize;
    float* lse =
        params.lse + (item.batch * visibility.num_heads + head) * visibility.seqlen_q + first_query;
    for (int64_t i = 0; i < num_queries; ++i) {
      lse[i] = row_base[i] * kLn2 + __builtin_logf(row_sum[i] / kProbabilityScale) + mean_score[i];
      row_sum[i] = row_sum[i] == 0 ? 0 : 1 / row_sum[i];
    }
    for (int64_t c = 0; c < num_queries; c += kStrip) {
      float* strip = scratch.out_strips + (slot * kBlockSize + c) * head_dim_v;
      for (int64_t d = 0; d < head_dim_v; ++d) {
        for (int i = 0; i < kStrip; ++i) strip[d * kStrip + i] *= value_scale[d];
      }
      write_strip(out, first_query + c, clip_count(c, num_queries, kStrip), strip, row_sum + c,
                  scratch.row_buffer);
    }
  }
}

inline int64_t quantized_attend_workspace_bytes(const AttendParams& params) {
  Arena arena;
  arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize));
  KeyHeadScales(arena, params);
  return workspace_bytes<QuantizedScratch>(arena, params);
}

inline void run_quantized_attend(const AttendParams& params) {
  const Visibility& visibility = params.visibility;
  if (params.heads.num_heads_k == 0) return;  // there are no query heads either
  const int num_threads = params.execution.num_threads;
  Arena arena(params.execution.workspace);
  SpanBounds* block_bounds = arena.take<SpanBounds>(visibility.num_span_bounds(kBlockSize));
  compute_span_bounds(visibility, kBlockSize, num_threads, block_bounds);

  const KeyHeadScales scales(arena, params);
  const auto compute_scales = [&](int thread, int64_t begin, int64_t end) {
    QuantizedScratch scratch = thread_scratch<QuantizedScratch>(arena, params, thread);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t batch = head / params.heads.num_heads_k;
      const int64_t key_head = head % params.heads.num_heads_k;
      compute_mean_key(params, batch, key_head, scales.mean_key_of(head), scratch);
      compute_value_scale(params, batch, key_head, scales.value_scale_of(head), scratch);
    }
  };
  parallel_for(num_threads, KeyHeadScales::num_heads(params), 1, compute_scales);

  const int64_t per_m_block = items_per_m_block(params);
  const auto attend_items = [&](int thread, int64_t begin, int64_t end) {
    QuantizedScratch scratch = thread_scratch<QuantizedScratch>(arena, params, thread);
    for (int64_t i = begin; i < end; ++i) {
      // From the last query block to the first: under the diagonal the longest come first.
      const int64_t m_block = visibility.num_m_blocks() - 1 - i / per_m_block;
      attend_quantized_item(params, block_bounds, scales, item_of(params, i % per_m_block, m_block),
                            scratch);
    }
  };
  parallel_for(num_threads, per_m_block * visibility.num_m_blocks(), 1, attend_items);
}

}  // namespace rrattn::cpu::RRATTN_SIMD
