// Tile sizes, shared memory and workspace of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "../../common/span_bounds.cuh"
#include "../common/barrier.cuh"
#include "../common/tensor_map.h"

namespace rrattn::cuda::sm90::attend {

using namespace cute;

constexpr int kConsumers = 2;  // warp groups of 64 rows each, together a query block
constexpr int kConsumerThreads = kConsumers * kWarpGroup;
constexpr int kConsumerRows = kBlockSize / kConsumers;

// The item of work: one row of the block mask.
struct RowItem {
  int index;  // in [B, Hq, Mq]; < 0: no row is left
  int m_block, head, batch;
  bool nothing_selected;
};

// Keys of a selected block: what the consumers take at a time.
struct KeyTile {
  int first_key;
  bool plain;  // no score is hidden, and the softmax scale is positive
  bool last;   // of the mask row
};

// Shared memory (227 KB): the query block, and kSlots tiles of kTileN keys and as many of values.
// Smaller tiles, a second query block and multicast to clusters are slower: see docs/tuning.md.
template <typename Element_, int kHeadDim_>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileN = kHeadDim <= 128 ? 128 : 64;  // at 256 out takes 128 registers
  static constexpr int kTilesPerBlock = kBlockSize / kTileN;
  static constexpr int kSlots = kHeadDim == 64 ? 4 : kHeadDim == 128 ? 3 : 2;
  static constexpr int kThreads = kConsumerThreads + kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again. The
  // consumers need no more than 232. Producers with 24 spill, and a slow one costs 1% to 15%.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kConsumerRows>, Int<kTileN>, Int<kHeadDim>>>()));
  using OutMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kConsumerRows>, Int<kHeadDim>, Int<kTileN>>, GMMA::Major::K,
                           GMMA::Major::MN>()));
  // All three lie in panels of 64 columns, as the copies bring them; the layout of a value tile is
  // the transposed view.
  using QueryLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                             Shape<Int<kConsumerRows>, Int<kHeadDim>>{}));
  using KeyLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                           Shape<Int<kTileN>, Int<kHeadDim>>{}));
  using ValueLayout = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                             Shape<Int<kHeadDim>, Int<kTileN>>{}, Step<_2, _1>{}));
  // For the same scores by products of a single warp: the instruction, and where elements lie.
  using WarpScoreMma =
      std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                         SM80_16x8x16_F32BF16BF16F32_TN, SM80_16x8x16_F32F16F16F32_TN>;
  using QueryOffsets = decltype(as_position_independent_swizzle_layout(QueryLayout{}));
  using KeyOffsets = decltype(as_position_independent_swizzle_layout(KeyLayout{}));
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kTileElements = kTileN * kHeadDim;
  static constexpr uint32_t kTileBytes = kTileElements * sizeof(Element);

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kConsumerRows * kHeadDim];
    alignas(1024) Element key[kSlots][kTileElements];
    alignas(1024) Element value[kSlots][kTileElements];
    Barrier row_full, row_empty;
    Barrier query_full[kConsumers], query_empty[kConsumers];
    Barrier key_full[kSlots], key_empty[kSlots], value_full[kSlots], value_empty[kSlots];
    Barrier value_uncleared[kSlots];  // values that are there, but still to be cleared
    RowItem row;
    KeyTile tile[kSlots];  // in the key slot
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

struct Workspace {
  SpanBounds* block_bounds;  // [B, bounds heads, Mk]
  int* next_item;
  void *query, *key, *value;  // copies of what no tensor map can describe; else empty

  Workspace(Arena& arena, const AttendParams& params) {
    block_bounds = arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize));
    next_item = arena.take<int>(1);
    const TensorShape query_shape = query_shape_of(params.visibility, params.heads);
    const TensorShape key_shape = key_shape_of(params.visibility, params.heads);
    query = arena.take<uint16_t>(elements_to_pack(params.query, query_shape));
    key = arena.take<uint16_t>(elements_to_pack(params.key, key_shape));
    value = arena.take<uint16_t>(elements_to_pack(params.value, key_shape));
  }
};

}  // namespace rrattn::cuda::sm90::attend
