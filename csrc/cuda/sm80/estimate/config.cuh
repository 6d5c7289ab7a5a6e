// Tile sizes, shared memory and workspace of the estimate on every GPU from Ampere on.
#pragma once

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "../../common/element.cuh"
#include "../../common/estimate/items.cuh"

namespace rrattn::cuda::sm80::estimate {

using namespace cuda::estimate;

constexpr int kTileStrides = 64;                  // pooled keys of a tile
constexpr int kThreadStrides = kTileStrides / 4;  // of a row, in one thread
constexpr int kRowTiles = 2;                      // of an item
constexpr int kItemRows = kRowTiles * kTileQueries;

// A tile of pooled keys, in the order in which the tensor cores' operands lie in registers.
//
// In a product of 16 x 8 x 16 the lane 4 g + t holds of key g the columns 2 t + {0, 1} and
// 2 t + {8, 9}. Which columns of the head these are does not matter, as long as queries and keys
// agree. So of 32 columns, those of two products, a lane takes the eight from 8 t on, 16 bytes that
// lie side by side in a tensor's row, and the bytes of a warp lie side by side in the tile:
//
//   [8 groups of 8 keys][kHeadDim / 32][lane][8 columns]
//
// The lane's accumulators are those of keys 2 t + {0, 1} of each group. Strides are put in such an
// order that these are the 16 strides from 16 t on. So the sums of key blocks need few exchanges.
// Variances lie in fours, those of the four lanes of a row side by side.
template <typename Element_, int kHeadDim_>
struct KeyTile {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStrides = kTileStrides;
  static constexpr int kElements = kTileStrides * kHeadDim;
  static constexpr int kVariances = kTileStrides;

  __host__ __device__ static constexpr int key_offset(int stride, int column) {
    const int t = stride / kThreadStrides, i = stride % kThreadStrides;
    const int lane = (t * 2 + i % 2) * 4 + column % 32 / 8;
    return ((i / 2 * (kHeadDim / 32) + column / 32) * 32 + lane) * 8;
  }
  __host__ __device__ static constexpr int variance_offset(int stride) {
    const int t = stride / kThreadStrides, i = stride % kThreadStrides;
    return i / 4 * 16 + t * 4 + i % 4;
  }
};

// The tile sizes by head size. A warp holds its queries in registers, up to 64 for each thread,
// beside the accumulators of a tile. Up to a head size of 128 it has 32 rows, which halves what it
// reads of shared memory for each product. There are several thread blocks on a multiprocessor, so
// that some compute while another is at the start or the end of an item. The key tiles fit into the
// shared memory of every GPU: multiprocessors of 8.6, 8.9 and 12.0 have 100 KB, of which 1 KB is
// taken for each thread block.
template <typename Element_, int kHeadDim_>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kFragments = kHeadDim <= 128 ? 2 : 1;  // of 16 rows, in a warp
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr int kThreads = kItemRows / kWarpRows * 32;
  // On a multiprocessor, by their registers: at most 168, 255 and 255 a thread.
  static constexpr int kThreadBlocks = kHeadDim == 64 ? 3 : kHeadDim == 128 ? 2 : 1;
  static constexpr int kKeySlots = 3;
  static_assert(kTileQueries % kWarpRows == 0);

  using Tile = KeyTile<Element, kHeadDim>;
  using Mma =
      std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                         cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;

  struct KeySlots {
    alignas(128) Element key[kKeySlots][Tile::kElements];
    alignas(128) float variance[kKeySlots][Tile::kVariances];
  };
  struct SharedStorage {
    union {
      KeySlots slots;
      float row_factor[kItemRows];  // 1 / the sum of the row, once no tile is needed any more
    };
    WorkItem<kRowTiles> item;
    int next_item;
  };
  static_assert(kThreadBlocks * (sizeof(SharedStorage) + 1024) <= 100 * 1024);
};

template <typename Traits>
struct Workspace {
  typename Traits::Element* pooled_keys;  // [B, Hkv, num_tiles] images of KeyTile
  // [B, Hkv, num_tiles, kTileStrides], over D on average; nothing without spread
  float* variances;
  float* block_sums;          // [thread blocks, kItemRows, row_sums]
  int64_t row_sums;           // sums of a row: all tiles have as many
  SpanBounds* stride_bounds;  // [B, bounds heads, num_strides]
  SpanBounds* tile_bounds;    // [B, bounds heads, num_tiles]
  int* num_taken;             // items that were taken besides the first of each thread block

  Workspace(Arena& arena, const EstimateParams& params, int num_thread_blocks, int tile_sums)
      : Workspace(arena, params, num_thread_blocks, tile_sums,
                  WorkLayout(params, kTileStrides, kRowTiles)) {}
  Workspace(Arena& arena, const EstimateParams& params, int num_thread_blocks, int tile_sums,
            const WorkLayout& layout)
      : Workspace(arena, params, num_thread_blocks, tile_sums,
                  static_cast<int64_t>(layout.key_heads) * layout.num_tiles, layout.num_tiles) {}
  // key_tiles: of all key heads; num_tiles: the most of one.
  Workspace(Arena& arena, const EstimateParams& params, int num_thread_blocks, int tile_sums,
            int64_t key_tiles, int num_tiles) {
    pooled_keys = arena.take<typename Traits::Element>(key_tiles * Traits::Tile::kElements);
    variances = arena.take<float>(params.sampling.spread > 0 ? key_tiles * kTileStrides : 0);
    row_sums = static_cast<int64_t>(num_tiles) * tile_sums;
    block_sums = arena.take<float>(num_thread_blocks * kItemRows * row_sums);
    stride_bounds =
        arena.take<SpanBounds>(params.visibility.num_span_bounds(params.sampling.key_stride));
    tile_bounds = arena.take<SpanBounds>(
        params.visibility.num_span_bounds(params.sampling.key_stride * kTileStrides));
    num_taken = arena.take<int>(1);
  }
  __device__ void clear_counters() const { *num_taken = 0; }
  // That of a request of a ragged batch, whose tiles begin with this one.
  __device__ Workspace from_tile(int64_t tile) const {
    Workspace own = *this;
    own.pooled_keys += tile * Traits::Tile::kElements;
    own.variances += tile * Traits::Tile::kVariances;
    return own;
  }
  // Those of a row of the thread block's item.
  __device__ float* sums_of(int row) const {
    return block_sums + (static_cast<int64_t>(blockIdx.x) * kItemRows + row) * row_sums;
  }
};

}  // namespace rrattn::cuda::sm80::estimate
