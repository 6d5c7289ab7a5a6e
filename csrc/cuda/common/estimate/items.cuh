// Which queries and strides make up an item of the estimate's work, whatever multiplies them.
#pragma once

#include <algorithm>
#include <cfloat>

#include "../heads.cuh"
#include "../softmax.cuh"
#include "../span_bounds.cuh"

namespace rrattn::cuda::estimate {

constexpr int kTileQueries = 64;  // sampled queries of a row tile: a whole block's at stride 2

// The sampled queries of one head in an item.
struct RowTile {
  bool active;
  int head;  // query head
  int first_sample;
  int first_token, last_token;
};

// The item of work: up to kRowTiles row tiles that share a key head.
template <int kRowTiles>
struct WorkItem {
  int index;      // < 0: no item is left
  int num_tiles;  // of strides that any of the rows sees under the diagonal
  int batch;
  int key_head;  // over all batch entries
  RowTile rows[kRowTiles];
};

// Counts of strides, rows and items. They are below 2^30, so that index arithmetic on the GPU stays
// in 32 bits.
struct WorkLayout {
  int num_strides;    // of the keys
  int num_tiles;      // of tile_strides strides
  int num_row_tiles;  // of kTileQueries sampled queries, of one head
  int group_size;     // query heads of a key head
  int key_heads;      // over all batch entries
  int num_items;
  float score_scale;      // brings products to scores in units of log2
  float variance_weight;  // times |q|^2: what a variance of 1 adds to a product

  __host__ __device__ WorkLayout(const EstimateParams& params, int tile_strides,
                                 int row_tiles_of_item)
      : num_strides(
            static_cast<int>(ceil_div(params.visibility.seqlen_k, params.sampling.key_stride))),
        num_tiles(static_cast<int>(ceil_div(num_strides, tile_strides))),
        num_row_tiles(static_cast<int>(
            ceil_div(ceil_div(params.visibility.seqlen_q, params.sampling.stride), kTileQueries))),
        group_size(static_cast<int>(cuda::group_size(params.visibility, params.heads))),
        key_heads(static_cast<int>(params.visibility.batch * params.heads.num_heads_k)),
        num_items(key_heads *
                  static_cast<int>(ceil_div(num_row_tiles * group_size, row_tiles_of_item))),
        // Not 0, which times the infinity of a hidden score would be NaN.
        score_scale(params.sampling.softmax_scale == 0 ? FLT_MIN
                                                       : params.sampling.softmax_scale * kLog2E),
        variance_weight(params.sampling.spread / 2 * params.sampling.softmax_scale) {}
};

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
template <int kKeyStride, int kTileStrides, int kRowTiles>
__device__ inline void fill_item(WorkItem<kRowTiles>& item, const EstimateParams& params,
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
      layout.num_row_tiles * layout.group_size - 1 - index / layout.key_heads * kRowTiles;
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

// Whether FlashMask hides a tile of strides, of kTileKeys keys, from all rows of the item.
template <int kTileKeys, int kRowTiles>
__device__ inline bool hides(const WorkItem<kRowTiles>& item, const EstimateParams& params,
                             const SpanBounds* tile_bounds, int tile) {
  if (params.visibility.row_bounds.data == nullptr) return false;
  for (const RowTile& rows : item.rows) {
    if (rows.active &&
        !span_bounds_of(params.visibility, kTileKeys, tile_bounds, item.batch, rows.head)[tile]
             .hides(rows.first_token, rows.last_token)) {
      return false;
    }
  }
  return true;
}

}  // namespace rrattn::cuda::estimate
