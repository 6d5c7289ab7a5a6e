// Tile sizes, shared memory and workspace of the estimate on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "run_bounds.cuh"

namespace rrattn::cuda {

using namespace cute;

constexpr int kTileStrides = 128;  // pooled keys of a tile
constexpr int kTileQueries = 64;   // sampled queries of a consumer warp group: the m of wgmma
constexpr int kWarpGroup = 128;

// The tile sizes by head size. Shared memory (227 KB): kConsumers query tiles and kStages key
// tiles.
//
// kConsumers on an H200, 128K tokens, 32 heads over 8, D 128, stride 8, causal, this kernel and the
// pooling: 2 warp groups 3.16 ms, 3 2.54 ms, 4 2.39 ms (4 spill 16 registers, and still win: what
// is short is warps to hide latency with). Making them take turns at the tensor cores changed
// nothing.
template <typename Element_, int kHeadDim_>
struct EstimateTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kStages = kHeadDim == 64 ? 6 : kHeadDim == 128 ? 4 : 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpGroup;
  // A thread block starts with 65,536 / kThreads registers a thread, rounded down to a multiple of
  // 8; the warp groups share these out again. Asking for more than the block has waits forever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
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
  using KeyOffsets = decltype(as_position_independent_swizzle_layout(KeyLayout{}));
  static constexpr int kKeyTileElements = kTileStrides * kHeadDim;
  static constexpr uint32_t kKeyTileBytes = kKeyTileElements * sizeof(Element);

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kTileQueries * kHeadDim];
    alignas(1024) Element key[kStages][kKeyTileElements];
    float row_factor[kConsumers][kTileQueries];
    cutlass::arch::ClusterTransactionBarrier full_barriers[kStages];
    cutlass::arch::ClusterBarrier empty_barriers[kStages];
    int item;
    int restart;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Counts of strides and rows: below 2^30, so that index arithmetic on the GPU stays in 32 bits.
struct EstimateLayout {
  int num_strides;    // of the keys
  int num_tiles;      // of kTileStrides strides
  int num_row_tiles;  // of kTileQueries sampled queries, of one head
  int group;          // query heads of a key head
  int key_heads;      // of all batch entries

  explicit EstimateLayout(const EstimateParams& params)
      : num_strides(static_cast<int>(ceil_div(params.visibility.seqlen_k, params.stride))),
        num_tiles(static_cast<int>(ceil_div(num_strides, kTileStrides))),
        num_row_tiles(static_cast<int>(
            ceil_div(ceil_div(params.visibility.seqlen_q, params.stride), kTileQueries))),
        group(static_cast<int>(params.visibility.num_heads / params.heads.num_heads_k)),
        key_heads(static_cast<int>(params.visibility.batch * params.heads.num_heads_k)) {}
};

template <typename Traits>
struct EstimateWorkspace {
  typename Traits::Element* pooled_keys;  // [B, Hkv, num_tiles] images of KeyLayout
  float* block_sums;  // [multiprocessors, kConsumers, num_tiles, kTileQueries, blocks of a tile]
  RunBounds* stride_bounds;  // [B, bounds heads, num_strides]
  RunBounds* tile_bounds;    // [B, bounds heads, num_tiles]
  int* next_item;

  EstimateWorkspace(Arena& arena, const EstimateParams& params, int num_multiprocessors) {
    const EstimateLayout layout(params);
    const int64_t key_tiles = static_cast<int64_t>(layout.key_heads) * layout.num_tiles;
    pooled_keys = arena.take<typename Traits::Element>(key_tiles * Traits::kKeyTileElements);
    block_sums = arena.take<float>(static_cast<int64_t>(num_multiprocessors) * Traits::kConsumers *
                                   layout.num_tiles * kTileQueries * blocks_per_tile(params));
    stride_bounds = arena.take<RunBounds>(params.visibility.num_run_bounds(params.stride));
    tile_bounds =
        arena.take<RunBounds>(params.visibility.num_run_bounds(params.stride * kTileStrides));
    next_item = arena.take<int>(1);
  }
  static int64_t blocks_per_tile(const EstimateParams& params) {
    return kTileStrides * params.stride / kBlockSize;
  }
};

}  // namespace rrattn::cuda
