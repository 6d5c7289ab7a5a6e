// What block-sparse attention works on: a row of the block mask at a time, taken by one producer
// warp and followed by all others, and which scores of its tiles are hidden.
#pragma once

#include "../../../core/geometry.h"
#include "../../common/attend_sections.cuh"
#include "../../common/softmax.cuh"
#include "barrier.cuh"

namespace rrattn::cuda::sm90 {

// The item of work: one row of the block mask, of a ragged batch with the request as its batch entry.
// index < 0: no row is left.
struct RowItem : MaskRow {
  bool without_tiles;
};

// The mask row of an item of a kernel's parameters; whether it has any tiles is not known yet.
template <typename KernelParams>
__device__ inline RowItem row_of_item(const KernelParams& params, int item) {
  return {cuda::row_of_item(item, params.places, params.attend.visibility, params.num_items,
                            params.section_heads),
          false};
}

// Which scores of a tile of keys are hidden from a thread's two rows, the tokens token_of(half). Bit
// i of hidden[half]: score i, of key first_key + accumulator_column(i) for the first thread of a quad,
// is. kUnseenKeys: whether some blocks may hold keys that no row sees. bounded: whether FlashMask, if
// there is one, may hide some.
template <bool kUnseenKeys, int kRowScores, typename TokenOf>
__device__ __forceinline__ void find_hidden(const Visibility& visibility, const RowItem& row,
                                            int first_key, bool bounded, const TokenOf& token_of,
                                            uint32_t (&hidden)[2]) {
  const RowBounds& layout = visibility.row_bounds;
  const int first = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
  const int end_key = static_cast<int>(visibility.seqlen_k);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = token_of(half);
    int end = visibility.causal ? min(token + static_cast<int>(visibility.shift()) + 1, end_key)
                                : end_key;
    // Rows past the end see nothing: what an unseen key holds must not show in their warp.
    if (kUnseenKeys && token >= static_cast<int>(visibility.seqlen_q)) end = 0;
    const int keys = max(end - first, 0);
    const int visible = keys / 8 * 2 + min(keys % 8, 2);  // accumulator_column(i) < keys
    hidden[half] = visible < 32 ? ~0u << visible : 0;
  }
  // Where FlashMask hides nothing, reading the bounds of all keys would take longer than the rest of
  // the tile.
  if (kUnseenKeys && bounded && layout.data != nullptr) {
    const int32_t* bounds = row_bounds_of(layout, row.batch, visibility.bounds_head(row.head));
#pragma unroll 4
    for (int i = 0; i < kRowScores; ++i) {
      const int key = first + accumulator_column(i);
      if (key >= end_key) break;
      const KeyBounds key_bounds = load_key_bounds(layout, visibility.causal, bounds, key);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        hidden[half] |= static_cast<uint32_t>(key_bounds.mask(token_of(half))) << i;
      }
    }
  }
}

}  // namespace rrattn::cuda::sm90
