// Tile sizes, shared memory and workspace of the estimate on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "../../common/estimate/items.cuh"
#include "../../common/ragged_plan.cuh"
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

  Workspace(Arena& arena, const EstimateParams& params, int num_multiprocessors)
      : Workspace(arena, params, num_multiprocessors,
                  WorkLayout(params, kTileStrides, Traits::kConsumers)) {}
  Workspace(Arena& arena, const EstimateParams& params, int num_multiprocessors,
            const WorkLayout& layout)
      : Workspace(arena, params, num_multiprocessors,
                  static_cast<int64_t>(layout.key_heads) * layout.num_tiles, layout.num_tiles,
                  layout.num_items) {}
  // key_tiles: of all key heads; num_tiles: the most of one.
  Workspace(Arena& arena, const EstimateParams& params, int num_multiprocessors, int64_t key_tiles,
            int num_tiles, int num_items) {
    pooled_keys = arena.take<typename Traits::Element>(key_tiles * Traits::kKeyTileElements);
    variances = arena.take<float>(params.sampling.spread > 0 ? key_tiles * kTileVariances : 0);
    consumer_sums = static_cast<int64_t>(num_tiles) * kTileQueries *
                    (kTileStrides * params.sampling.key_stride / kBlockSize);
    block_sums = arena.take<float>(num_multiprocessors * Traits::kConsumers * consumer_sums);
    stride_bounds =
        arena.take<SpanBounds>(params.visibility.num_span_bounds(params.sampling.key_stride));
    tile_bounds = arena.take<SpanBounds>(
        params.visibility.num_span_bounds(params.sampling.key_stride * kTileStrides));
    next_item = arena.take<int>(3 + num_items);
    num_outgrown = next_item + 2;
    outgrown_items = next_item + 3;
  }
  __device__ void clear_counters() const { next_item[0] = next_item[1] = *num_outgrown = 0; }
  // That of a request of a ragged batch, whose tiles begin with this one.
  __device__ Workspace from_tile(int64_t tile) const {
    Workspace own = *this;
    own.pooled_keys += tile * Traits::kKeyTileElements;
    own.variances += tile * kTileVariances;
    return own;
  }
  __device__ float* sums_of(int consumer) const {
    return block_sums +
           (static_cast<int64_t>(blockIdx.x) * Traits::kConsumers + consumer) * consumer_sums;
  }
};

// What the kernel needs to know of an item, in a usual call and in a ragged batch. `params` and
// `layout` are the call's, or what all requests of the batch have in common.

struct UsualCall {
  __device__ static int num_items(const EstimateParams&, const WorkLayout& layout) {
    return layout.num_items;
  }
  template <int kKeyStride, typename Item>
  __device__ static void fill(Item& item, const EstimateParams& params, const WorkLayout& layout,
                              int index) {
    fill_item<kKeyStride, kTileStrides>(item, params, layout, index);
  }
  template <typename Item>
  __device__ static const EstimateParams& params_of(const Item&, const EstimateParams& params) {
    return params;
  }
  template <typename Item>
  __device__ static const WorkLayout& layout_of(const Item&, const WorkLayout& layout) {
    return layout;
  }
  template <typename Item>
  __device__ static int batch_of(const Item& item) {
    return item.batch;
  }
  // The first tile of pooled keys of the item's key head.
  template <typename Item>
  __device__ static int64_t first_tile_of(const Item& item, const WorkLayout& layout) {
    return static_cast<int64_t>(item.key_head) * layout.num_tiles;
  }
};

// Items have their request as their batch.
struct RaggedRequests {
  RaggedPlan plan;

  __device__ int num_items(const EstimateParams& params, const WorkLayout&) const {
    return plan.num_items() * static_cast<int>(params.heads.num_heads_k);
  }
  template <int kKeyStride, typename Item>
  __device__ void fill(Item& item, const EstimateParams& params, const WorkLayout&,
                       int index) const {
    const int num_heads_k = static_cast<int>(params.heads.num_heads_k);
    const RequestPart part = plan.items[index / num_heads_k];
    const RaggedEstimate& estimate = plan.estimate[part.request];
    fill_item<kKeyStride, kTileStrides>(item, estimate.call.params, estimate.layout,
                                        part.index * num_heads_k + index % num_heads_k);
    item.index = index;
    item.batch = part.request;
  }
  template <typename Item>
  __device__ const EstimateParams& params_of(const Item& item, const EstimateParams&) const {
    return plan.estimate[item.batch].call.params;
  }
  template <typename Item>
  __device__ const WorkLayout& layout_of(const Item& item, const WorkLayout&) const {
    return plan.estimate[item.batch].layout;
  }
  template <typename Item>
  __device__ static int batch_of(const Item&) {
    return 0;
  }
  template <typename Item>
  __device__ int64_t first_tile_of(const Item& item, const WorkLayout& layout) const {
    const WorkLayout& own = layout_of(item, layout);
    return static_cast<int64_t>(plan.first_tiles[item.batch]) * own.key_heads +
           static_cast<int64_t>(item.key_head) * own.num_tiles;
  }
};

}  // namespace rrattn::cuda::sm90::estimate
