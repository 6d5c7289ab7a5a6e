// Tile sizes and shared memory of the gradients for head sizes up to 64.
#pragma once

#include "../config.cuh"

namespace rrattn::cuda::sm90::backward::narrow {

// Each consumer has 64 keys, as for larger heads. But the 64 columns of dQ fill one panel, of which
// wgmma takes no half: so the consumers go through both tiles of a query block, and then each
// computes dQ of one of them.
template <typename Element_, bool kDeterministic_>
struct KernelTraits {
  using Element = Element_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kHeadDim = 64;       // of queries and keys
  static constexpr int kHeadDimV = 64;      // of values and out
  static constexpr int kKeys = kBlockSize;  // of an item
  // Slots of query blocks. Of queries one is the last block's, whose dQ is not sent yet.
  static constexpr int kQueryBlocks = 3;
  static constexpr int kGradOutBlocks = 2;
  static constexpr int kGradScoreBlocks = 2;
  static constexpr int kQuerySlots = kQueryBlocks * kQueryTiles;
  static constexpr int kGradOutSlots = kGradOutBlocks * kQueryTiles;
  static constexpr int kSumsTiles = kQueryTiles;             // that are sent at once
  static constexpr int kSumsRows = kSumsTiles * kQueryTile;  // whose first share is stored
  static constexpr int kGradQueryThreads = kWarpGroup;       // that have dQ of a tile
  static constexpr int kThreads = kConsumerThreads + kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using Consumers = Layout<Shape<Int<kConsumers>, _1, _1>>;
  // S^T and dP^T: [keys, queries] over columns.
  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kKeys>, Int<kQueryTile>, Int<kHeadDim>>>(),
      Consumers{}));
  // dV and dK: [keys, columns] over queries.
  using GradKeyMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kKeys>, Int<kHeadDim>, Int<kQueryTile>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Consumers{}));
  // dQ: [queries, columns] over keys; of one consumer.
  using GradQueryMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kQueryTile>, Int<kHeadDim>, Int<kKeys>>, GMMA::Major::MN,
                           GMMA::Major::MN>()));

  // A panel of 64 columns, as the copies bring it; the same memory seen from either side.
  using ColumnsAtom = GMMA::Layout_K_SW128_Atom<Element>;
  using RowsAtom = GMMA::Layout_MN_SW128_Atom<Element>;
  using KeyLayout = decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
  using KeyLayoutT = decltype(tile_to_shape(RowsAtom{}, Shape<Int<kHeadDim>, Int<kKeys>>{}));
  using QueryLayout =
      decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kQueryTile>, Int<kHeadDim>>{}));
  using QueryLayoutT = decltype(tile_to_shape(RowsAtom{}, Shape<Int<kHeadDim>, Int<kQueryTile>>{}));
  using ScoreLayout = decltype(tile_to_shape(RowsAtom{}, Shape<Int<kQueryTile>, Int<kKeys>>{}));
  using ScoreOffsets = decltype(as_position_independent_swizzle_layout(ScoreLayout{}));
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kValuePanels = kHeadDimV / kPanel;

  struct SharedStorage {
    alignas(1024) Element key[kKeys * kHeadDim];
    alignas(1024) Element value[kKeys * kHeadDimV];
    alignas(1024) Element query[kQuerySlots][kQueryTile * kHeadDim];
    alignas(1024) Element grad_out[kGradOutSlots][kQueryTile * kHeadDimV];
    // dS of the tiles of a block, the earlier queries first.
    alignas(1024) Element grad_scores[kGradScoreBlocks][kQueryTiles][kQueryTile * kKeys];
    alignas(128) uint32_t grad_query[kQueryTiles][kQueryTile * kHeadDim];  // in accumulator order
    alignas(128) float score_start[kQuerySlots][kQueryTile];
    alignas(128) float grad_score_start[kGradOutSlots][kQueryTile];
    alignas(128) float query_scale[kQuerySlots][kQueryTile];  // if deterministic
    alignas(128) float key_scale[kHeadDim];                   // if deterministic
    Barrier item_full, item_empty;
    Barrier turn_full[kConsumers], turn_empty[kConsumers];      // between keepers and consumers
    Barrier query_full[kQuerySlots], query_empty[kQuerySlots];  // score_start, query_scale, step
    Barrier grad_out_full[kGradOutSlots], grad_out_empty[kGradOutSlots];  // grad_score_start
    Barrier grad_scores_full[kGradScoreBlocks];
    Barrier sums_full, sums_empty;  // between the consumers and the writer
    Item<kKeys> item;
    Turn<kKeys> turn[kConsumers];
    QueryStep step[kQuerySlots];
    // For each step the tile of [B, Hq, Mq * kQueryTiles] to which its dQ is to be added; < 0: no
    // step is left.
    int sums_tile[kQuerySlots];
    // A bit for each key of the item, then for each value: whether it is not finite and some query
    // sees it. It is zero in `key` or `value` then.
    uint32_t not_finite[2 * kKeys / 32];
    bool any_not_finite;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace rrattn::cuda::sm90::backward::narrow
