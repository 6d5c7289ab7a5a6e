// The workspace of the gradients of block-sparse attention.
#pragma once

#include "../launch.cuh"
#include "../span_bounds.cuh"

namespace rrattn::cuda::backward {

// Rows of [B, Hq, Mq, kBlockSize], those past the end included.
inline int64_t num_padded_rows(const Visibility& visibility) {
  return visibility.num_mask_rows() * kBlockSize;
}

// Of the sums of some rows of dQ: whether there are any to add to. Either they started as zeros, before
// the kernel that adds shares, or its first share is stored.
enum SumsState : int { kNoSums, kFirstUnderWay, kSums, kZerosAtFirst };

// grad_query holds the sums of dS K. In float32 they depend on the order in which the key blocks
// are added. In deterministic mode they are therefore whole numbers of 32 bits, in units of
// 1 / (query_scale * key_scale): powers of 2 such that no sum, of any row and column, reaches 2^30.
// The scales come from the bound
//
//   |sum_j dS[i, j] K[j, c]| <= sum_j P[i, j] (|dO_i| |V_j| + |delta_i|) |K[j, c]|,
//
// where the probabilities add up to 1. Twice the bound is allowed for, so the resolution is 2^-29
// of the bound.
struct Workspace {
  SpanBounds* block_bounds;   // [B, bounds heads, Mk]
  uint32_t* transposed_mask;  // [B, Hq, Mk, ceil(Mq / 32)]
  float* score_start;         // [B, Hq, Mq, kBlockSize]: -lse / scale, or P = 0 if nothing is seen
  float* grad_score_start;    // the same: -delta = grad_lse - rowsum(dO * O)
  float* query_scale;         // the same, if deterministic
  // [B, Hq, Mq, kBlockSize * columns], the tiles of a block one after the other, each in the order
  // of the kernel's accumulators.
  uint32_t* grad_query;
  int* sums_state;  // a SumsState of each sums_rows of these rows, or null: they start as zeros
  int sums_rows;
  int* next_item;
  // If deterministic: the largest over all keys, as the bits of a float32 that is not negative.
  uint32_t* key_column;  // |K|: [B, Hkv, columns]
  uint32_t* value_norm;  // |V_j|^2: [B, Hkv]
  float* key_scale;      // [B, Hkv, columns]

  // Columns: the padded head size of queries and keys. sums_rows 0: there are no states.
  Workspace(Arena& arena, const BackwardParams& params, int columns, int sums_rows = 0)
      : sums_rows(sums_rows) {
    const Visibility& visibility = params.visibility;
    const int64_t rows = num_padded_rows(visibility);
    const int64_t key_heads = visibility.batch * params.heads.num_heads_k;
    block_bounds = arena.take<SpanBounds>(visibility.num_span_bounds(kBlockSize));
    transposed_mask =
        arena.take<uint32_t>(visibility.batch * visibility.num_heads * visibility.num_n_blocks() *
                             ceil_div(visibility.num_m_blocks(), kMaskWordBits));
    score_start = arena.take<float>(rows);
    grad_score_start = arena.take<float>(rows);
    query_scale = arena.take<float>(params.deterministic ? rows : 0);
    grad_query = arena.take<uint32_t>(rows * columns);
    sums_state = sums_rows == 0 ? nullptr : arena.take<int>(rows / sums_rows);
    next_item = arena.take<int>(1);
    key_column = arena.take<uint32_t>(params.deterministic ? key_heads * columns : 0);
    value_norm = arena.take<uint32_t>(params.deterministic ? key_heads : 0);
    key_scale = arena.take<float>(params.deterministic ? key_heads * columns : 0);
  }
};

// The softmax scale, or 2^-100 where it is closer to 0: lse / scale must be a number.
__host__ __device__ inline float usable_scale(float scale) {
  return fabsf(scale) >= 0x1p-100f ? scale : 0x1p-100f;
}

}  // namespace rrattn::cuda::backward
