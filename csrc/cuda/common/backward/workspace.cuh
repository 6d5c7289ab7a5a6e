// The workspace of the gradients of block-sparse attention, and the order in which its items of work
// are taken.
#pragma once

#include "../launch.cuh"
#include "../span_bounds.cuh"
#include "../work_order.cuh"

namespace rrattn::cuda::backward {

// Rows of [B, Hq, Mq, kBlockSize], those past the end included.
inline int64_t num_padded_rows(const Visibility& visibility) {
  return visibility.batch * visibility.num_heads * visibility.num_m_blocks() * kBlockSize;
}

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
  int* next_item;
  // If deterministic: the largest over all keys, as the bits of a float32 that is not negative.
  uint32_t* key_column;  // |K|: [B, Hkv, columns]
  uint32_t* value_norm;  // |V_j|^2: [B, Hkv]
  float* key_scale;      // [B, Hkv, columns]

  // Columns: the padded head size of queries and keys.
  Workspace(Arena& arena, const BackwardParams& params, int columns) {
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
    next_item = arena.take<int>(1);
    key_column = arena.take<uint32_t>(params.deterministic ? key_heads * columns : 0);
    value_norm = arena.take<uint32_t>(params.deterministic ? key_heads : 0);
    key_scale = arena.take<float>(params.deterministic ? key_heads * columns : 0);
  }
};

// The softmax scale, or 2^-100 where it is closer to 0: lse / scale must be a number.
__device__ inline float usable_scale(float scale) {
  return fabsf(scale) >= 0x1p-100f ? scale : 0x1p-100f;
}

// The place of an item of kKeys keys, a key block or a part of one. Key blocks go from the first,
// under the diagonal the longest, to the last.
template <int kKeys>
struct Place {
  static constexpr int kParts = kBlockSize / kKeys;  // of a key block

  int part, key_head, batch;  // part: of those of all key blocks

  Place() = default;
  __device__ Place(int part, int key_head, int batch)
      : part(part), key_head(key_head), batch(batch) {}
  // num_items: of all key heads. section_heads: key heads of a section, as place_of_item says.
  __device__ Place(const BackwardParams& params, int num_items, int section_heads, int item) {
    const int num_parts = static_cast<int>(params.visibility.num_n_blocks()) * kParts;
    const int num_heads_k = static_cast<int>(params.heads.num_heads_k);
    const WorkPlace place = place_of_item(item, num_items / num_parts, num_parts, section_heads);
    part = place.block;
    key_head = place.head % num_heads_k;
    batch = place.head / num_heads_k;
  }
  __device__ int n_block() const { return part / kParts; }
  __device__ int first_key() const { return part * kKeys; }
};

}  // namespace rrattn::cuda::backward
