// Tile sizes, shared memory and workspace of the estimate on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "../../common/estimate/items.cuh"
#include "../common/wgmma.cuh"

namespace rrattn::cuda::sm90::estimate {

using namespace cute;
using namespace cuda::estimate;

constexpr int kTileStrides = 128;   // pooled keys of a tile
static_assert(kTileQueries == 64);  // a row tile is a consumer warp group's: the m of wgmma

// Floats in which the variances of a tile lie: those of the strides of a thread and 16 bytes more,
// so that the four threads of a row read from different banks.
constexpr int kThreadVariances = kTileStrides / 4 + 4;
constexpr int kTileVariances = 4 * kThreadVariances;

constexpr int kMaxChunkSlots = 2;
constexpr int kItemSlots = 2;  // items under way: one at the consumers, one before or after them

// The tile sizes by head size. Shared memory (227 KB): kConsumers query tiles, kKeySlots key tiles
// with their variances, and chunks of sums on their way back. Four consumers beat fewer, since what
// is short is warps to hide latency with: see docs/tuning.md.
template <typename Element_, int kHeadDim_>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kKeySlots = kHeadDim == 64 ? 8 : kHeadDim == 128 ? 4 : 2;
  static constexpr int kChunkBytes = 28672;  // of all chunks: what is left
  static constexpr int kThreads = (kConsumers + 1) * kWarpGroup;
  // A thread block starts with 65,536 / kThreads registers a thread, rounded down to a multiple of
  // 8; the warp groups share these out again. A group that asks for more than are left waits
  // forever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kServiceRegisters = 64;
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 104 : 216;
  static_assert(kServiceRegisters + kConsumers * kConsumerRegisters <=
                (kConsumers + 1) * kStartRegisters);

  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kTileQueries>, Int<kTileStrides>, Int<kHeadDim>>>()));
  using SmemAtom = GMMA::Layout_K_SW128_Atom<Element>;
  using QueryLayout =
      decltype(tile_to_shape(SmemAtom{}, Shape<Int<kTileQueries>, Int<kHeadDim>>{}));
  using KeyLayout = decltype(tile_to_shape(SmemAtom{}, Shape<Int<kTileStrides>, Int<kHeadDim>>{}));
  // Where an element lies in such a tile, for stores that do not go through a CuTe tensor.
  using QueryOffsets = decltype(as_position_independent_swizzle_layout(QueryLayout{}));
  static constexpr int kKeyTileElements = kTileStrides * kHeadDim;
  static constexpr uint32_t kKeyTileBytes = kKeyTileElements * sizeof(Element);

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kTileQueries * kHeadDim];
    alignas(1024) Element key[kKeySlots][kKeyTileElements];
    alignas(128) float variance[kKeySlots][kTileVariances];
    alignas(128) float chunk[kChunkBytes / sizeof(float)];
    // 1 / the sum of the row; until that is known, what a variance of 1 adds to its products
    float row_factor[kItemSlots][kConsumers][kTileQueries];
    Barrier key_full[kKeySlots], key_empty[kKeySlots];
    Barrier item_full[kItemSlots], item_empty[kItemSlots], sums_full[kItemSlots];
    Barrier chunk_full[kConsumers + 1][kMaxChunkSlots];
    int tile[kKeySlots];  // in that slot; < 0: none, the pass is over
    WorkItem<kConsumers> item[kItemSlots];
    bool outgrown[kItemSlots];       // a row sum has reached kOutgrown
    volatile int64_t sums_position;  // up to here sums have been read back
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
  static_assert(kKeySlots * kKeyTileBytes >= kConsumers * kChunkBytes);
};

template <typename Traits>
struct Workspace {
  typename Traits::Element* pooled_keys;  // [B, Hkv, num_tiles] images of KeyLayout
  // [B, Hkv, num_tiles, kTileVariances], over D on average; nothing without spread
  float* variances;
  float* block_sums;  // [multiprocessors, kConsumers, num_tiles, kTileQueries, blocks of a tile]
  int64_t consumer_sums;      // elements of these for one consumer
  SpanBounds* stride_bounds;  // [B, bounds heads, num_strides]
  SpanBounds* tile_bounds;    // [B, bounds heads, num_tiles]
  int* next_item;             // [2]: of the first launch, of the one for outgrown items
  int* num_outgrown;
  int* outgrown_items;  // [num_items]

  Workspace(Arena& arena, const EstimateParams& params, int num_multiprocessors) {
    const WorkLayout layout(params, kTileStrides, Traits::kConsumers);
    const int64_t key_tiles = static_cast<int64_t>(layout.key_heads) * layout.num_tiles;
    pooled_keys = arena.take<typename Traits::Element>(key_tiles * Traits::kKeyTileElements);
    variances = arena.take<float>(params.sampling.spread > 0 ? key_tiles * kTileVariances : 0);
    consumer_sums = static_cast<int64_t>(layout.num_tiles) * kTileQueries *
                    (kTileStrides * params.sampling.key_stride / kBlockSize);
    block_sums = arena.take<float>(num_multiprocessors * Traits::kConsumers * consumer_sums);
    stride_bounds =
        arena.take<SpanBounds>(params.visibility.num_span_bounds(params.sampling.key_stride));
    tile_bounds = arena.take<SpanBounds>(
        params.visibility.num_span_bounds(params.sampling.key_stride * kTileStrides));
    next_item = arena.take<int>(3 + layout.num_items);
    num_outgrown = next_item + 2;
    outgrown_items = next_item + 3;
  }
  __device__ void clear_counters() const { next_item[0] = next_item[1] = *num_outgrown = 0; }
  __device__ float* sums_of(int consumer) const {
    return block_sums +
           (static_cast<int64_t>(blockIdx.x) * Traits::kConsumers + consumer) * consumer_sums;
  }
};

}  // namespace rrattn::cuda::sm90::estimate
