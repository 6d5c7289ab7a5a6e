// The mean key and the mean value of each key block, for attention that is compensated.
#pragma once

#include "tiles.h"

namespace rrattn::cpu::RRATTN_SIMD {

// Both lie as tiles do, [B, Hkv, rows, D] and [B, Hkv, rows, Dv] float32, with zeros in the rows
// past Mk that fill up the last register tile. Means that stand in for nothing are in tiles too,
// where their probability is 0. So a mean value with a NaN or infinity is zero, and its mean key NaN
// instead: it shows in all that it stands in for, and nowhere else.
struct BlockMeans {
  int64_t rows;  // of a head
  int64_t head_dim, head_dim_v;
  float *keys, *values;  // nothing without compensation

  BlockMeans(Arena& arena, const AttendParams& params)
      : rows(params.compensate ? round_up(params.visibility.num_n_blocks(), kTileRows) : 0),
        head_dim(params.heads.head_dim),
        head_dim_v(params.heads.head_dim_v),
        keys(arena.take<float>(num_heads(params) * rows * head_dim)),
        values(arena.take<float>(num_heads(params) * rows * head_dim_v)) {}

  // Of a key head, over all batch entries, the means from a block on.
  float* key(int64_t head, int64_t block) const { return keys + (head * rows + block) * head_dim; }
  float* value(int64_t head, int64_t block) const {
    return values + (head * rows + block) * head_dim_v;
  }

  static int64_t num_heads(const AttendParams& params) {
    return params.visibility.batch * params.heads.num_heads_k;
  }
};

// mean[D] of the rows [first_row, first_row + num_rows); whether all of it is finite.
inline bool mean_row(const HeadView& head, int64_t first_row, int64_t num_rows, float* mean,
                     float* row_buffer) {
  memset(mean, 0, head.head_dim * sizeof(float));
  for (int64_t r = 0; r < num_rows; ++r) {
    head.read(first_row + r, row_buffer);
    for (int64_t d = 0; d < head.head_dim; ++d) mean[d] += row_buffer[d];
  }
  bool finite = true;
  for (int64_t d = 0; d < head.head_dim; ++d) {
    mean[d] /= static_cast<float>(num_rows);
    finite &= mean[d] - mean[d] == 0;
  }
  return finite;
}

// Row `row` of the means of one head of one batch entry.
inline void compute_block_mean(const AttendCall& call, const BlockMeans& means, int64_t head,
                               int64_t row, float* row_buffer) {
  const AttendParams& params = call.params;
  float *mean_key = means.key(head, row), *mean_value = means.value(head, row);
  const int64_t first_key = row * kBlockSize;
  const int64_t num_keys = clip_count(first_key, params.visibility.seqlen_k, kBlockSize);
  if (num_keys == 0) {
    memset(mean_key, 0, means.head_dim * sizeof(float));
    memset(mean_value, 0, means.head_dim_v * sizeof(float));
    return;
  }
  const int64_t batch = head / params.heads.num_heads_k, key_head = head % params.heads.num_heads_k;
  const HeadView key = key_head_of(params.key, params.heads, batch, key_head, call.pages);
  const HeadView value = value_head_of(params.value, params.heads, batch, key_head, call.pages);
  mean_row(key, first_key, num_keys, mean_key, row_buffer);
  if (mean_row(value, first_key, num_keys, mean_value, row_buffer)) return;
  memset(mean_value, 0, means.head_dim_v * sizeof(float));
  for (int64_t d = 0; d < means.head_dim; ++d) mean_key[d] = __builtin_nanf("");
}

}  // namespace rrattn::cpu::RRATTN_SIMD
