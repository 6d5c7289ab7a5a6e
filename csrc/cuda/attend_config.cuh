// Tile sizes, shared memory and workspace of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "barrier.cuh"
#include "run_bounds.cuh"
#include "tensor_map.h"

namespace rrattn::cuda {

using namespace cute;

constexpr int kConsumerGroups = 2;  // of 64 rows each, together a query block
constexpr int kGroupRows = kBlockSize / kConsumerGroups;

// The unit of work: one row of the block mask.
struct AttendRow {
  int index;  // of [B, Hq, Mq]; < 0: no row is left
  int m_block, head, batch;
  bool nothing_selected;
};

// One step of a row: kTileN keys of a selected block.
struct AttendTile {
  int first_key;
  bool plain;  // no score is hidden, and the softmax scale is positive
  bool last;   // of the row
};

// Shared memory (227 KB): the query block, and kStages tiles of kTileN keys and as many of values.
// Smaller tiles, a second query block and multicast to clusters are slower: see docs/tuning.md.
template <typename Element_, int kHeadDim_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileN = kHeadDim <= 128 ? 128 : 64;  // at 256 out takes 128 registers
  static constexpr int kTilesPerBlock = kBlockSize / kTileN;
  static constexpr int kStages = kHeadDim == 64 ? 4 : kHeadDim == 128 ? 3 : 2;
  static constexpr int kThreads = (kConsumerGroups + 1) * kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again. The
  // consumers need no more than 232. Producers with 24 spill, and a slow one costs 1% to 15%.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kGroupRows>, Int<kTileN>, Int<kHeadDim>>>()));
  using OutMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kGroupRows>, Int<kHeadDim>, Int<kTileN>>, GMMA::Major::K,
                           GMMA::Major::MN>()));
  // All three lie in panels of 64 columns, as the copies bring them; the layout of a value tile is
  // the transposed view.
  using QueryLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                             Shape<Int<kGroupRows>, Int<kHeadDim>>{}));
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
    alignas(1024) Element query[kConsumerGroups][kGroupRows * kHeadDim];
    alignas(1024) Element key[kStages][kTileElements];
    alignas(1024) Element value[kStages][kTileElements];
    Barrier row_full, row_empty;
    Barrier query_full[kConsumerGroups], query_empty[kConsumerGroups];
    Barrier key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
    Barrier value_uncleared[kStages];  // values that are there, but still to be cleared
    AttendRow row;
    AttendTile tile[kStages];  // in the key stage
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

struct AttendWorkspace {
  RunBounds* block_bounds;  // [B, bounds heads, Mk]
  int* next_row;
  void *query, *key, *value;  // copies of what no tensor map can describe; else empty

  AttendWorkspace(Arena& arena, const AttendParams& params) {
    block_bounds = arena.take<RunBounds>(params.visibility.num_run_bounds(kBlockSize));
    next_row = arena.take<int>(1);
    const TensorShape query_shape = query_shape_of(params.visibility, params.heads);
    const TensorShape key_shape = key_shape_of(params.visibility, params.heads);
    query = arena.take<uint16_t>(elements_to_pack(params.query, query_shape));
    key = arena.take<uint16_t>(elements_to_pack(params.key, key_shape));
    value = arena.take<uint16_t>(elements_to_pack(params.value, key_shape));
  }
};

}  // namespace rrattn::cuda
