// Which queries and strides make up an item.
#pragma once

#include "block_sums.cuh"

namespace rrattn::cuda::sm90::estimate {

// How many strides a token sees under the diagonal.
template <int kKeyStride>
__device__ inline int visible_strides(const Visibility& visibility, const WorkLayout& layout,
                                      int token) {
  if (!visibility.causal) return layout.num_strides;
  return min((token + static_cast<int>(visibility.shift())) / kKeyStride + 1, layout.num_strides);
}

// Fills an item by its number. Numbers count key heads first, then row tiles from the last, the
// longest, to the first. The row tiles of a key head are ordered by their rows, then by their
// heads.
template <int kKeyStride, int kConsumers>
__device__ inline void fill_item(WorkItem<kConsumers>& item, const EstimateParams& params,
                                 const WorkLayout& layout, int index) {
  const Visibility& visibility = params.visibility;
  const int num_heads_k = static_cast<int>(params.heads.num_heads_k);
  const int seqlen_q = static_cast<int>(visibility.seqlen_q);
  const int stride = static_cast<int>(params.sampling.stride);
  item.index = index;
  item.key_head = index % layout.key_heads;
  item.batch = item.key_head / num_heads_k;
  item.num_tiles = 0;
  int row_tile =
      layout.num_row_tiles * layout.group_size - 1 - index / layout.key_heads * kConsumers;
  for (RowTile& rows : item.rows) {
    rows.head = item.key_head % num_heads_k * layout.group_size + row_tile % layout.group_size;
    rows.first_sample = row_tile / layout.group_size * kTileQueries;
    const int phase = static_cast<int>((params.sampling.head_offset + rows.head) % stride);
    rows.first_token = rows.first_sample * stride + phase;
    rows.last_token =
        min(rows.first_sample + kTileQueries - 1, (seqlen_q - 1 - phase) / stride) * stride + phase;
    rows.active = row_tile >= 0;
    if (rows.active && rows.first_token < seqlen_q) {
      const int strides = visible_strides<kKeyStride>(visibility, layout, rows.last_token);
      item.num_tiles = max(item.num_tiles, (strides + kTileStrides - 1) / kTileStrides);
    }
    --row_tile;
  }
}

// Whether FlashMask hides the tile from all rows of the item.
template <int kKeyStride, typename Traits>
__device__ inline bool hides(const WorkItem<Traits::kConsumers>& item, const EstimateParams& params,
                             const Workspace<Traits>& workspace, int tile) {
  if (params.visibility.row_bounds.data == nullptr) return false;
  for (const RowTile& rows : item.rows) {
    if (rows.active && !span_bounds_of(params.visibility, kKeyStride * kTileStrides,
                                       workspace.tile_bounds, item.batch, rows.head)[tile]
                            .hides(rows.first_token, rows.last_token)) {
      return false;
    }
  }
  return true;
}

}  // namespace rrattn::cuda::sm90::estimate
