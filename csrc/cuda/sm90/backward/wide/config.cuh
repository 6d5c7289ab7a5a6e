// Tile sizes and shared memory of the gradients for head sizes above 128.
#pragma once

#include "../config.cuh"

namespace rrattn::cuda::sm90::backward::wide {

// An item has 64 keys, half a key block: neither shared memory nor the registers of both consumers
// have room for more. A consumer has no room for dK and dV of the same keys either. So the first
// has S^T, P^T and dV, and the second dP^T, dS^T and dK; P goes from the first to the second, in
// float32, and each computes half of the columns of dQ.
template <typename Element_, int kHeadDim_, int kHeadDimV_, bool kDeterministic_>
struct KernelTraits {
  using Element = Element_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kHeadDim = kHeadDim_;    // of queries and keys
  static constexpr int kHeadDimV = kHeadDimV_;  // of values and out
  static constexpr int kKeys = kWarpGroup / 2;  // of an item: the m of wgmma
  static constexpr int kQuerySlots = 2;
  static constexpr int kGradOutSlots = 2;
  static constexpr int kGradScoreSlots = 2;
  static constexpr int kSumsRows = 0;                         // all shares are added
  static constexpr int kGradQueryThreads = kConsumerThreads;  // that have dQ of a tile
  static constexpr int kThreads = kConsumerThreads + kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  // S^T and dP^T: [keys, queries] over columns.
  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kKeys>, Int<kQueryTile>, Int<kHeadDim>>>()));
  // dK and dV: [keys, columns] over queries.
  template <int kColumns>
  using ColumnsMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kKeys>, Int<kColumns>, Int<kQueryTile>>, GMMA::Major::K,
                           GMMA::Major::MN>()));
  using GradKeyMma = ColumnsMma<kHeadDim>;
  using GradValueMma = ColumnsMma<kHeadDimV>;
  // dQ: [queries, columns] over keys; the consumers side by side.
  using GradQueryMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kQueryTile>, Int<kHeadDim / kConsumers>, Int<kKeys>>,
                           GMMA::Major::MN, GMMA::Major::MN>(),
      Layout<Shape<_1, Int<kConsumers>, _1>>{}));

  // Panels of 64 columns, as the copies bring them; the same memory seen from either side.
  using ColumnsAtom = GMMA::Layout_K_SW128_Atom<Element>;
  using RowsAtom = GMMA::Layout_MN_SW128_Atom<Element>;
  template <int kRows, int kColumns>
  using RowLayout = decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kRows>, Int<kColumns>>{}));
  template <int kRows, int kColumns>
  using RowLayoutT =
      decltype(tile_to_shape(RowsAtom{}, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{}));
  using KeyLayout = RowLayout<kKeys, kHeadDim>;
  using KeyLayoutT = RowLayoutT<kKeys, kHeadDim>;
  using ValueLayout = RowLayout<kKeys, kHeadDimV>;
  using QueryLayout = RowLayout<kQueryTile, kHeadDim>;
  using QueryLayoutT = RowLayoutT<kQueryTile, kHeadDim>;
  using GradOutLayout = RowLayout<kQueryTile, kHeadDimV>;
  using GradOutLayoutT = RowLayoutT<kQueryTile, kHeadDimV>;
  using ScoreLayout = decltype(tile_to_shape(RowsAtom{}, Shape<Int<kQueryTile>, Int<kKeys>>{}));
  using ScoreOffsets = decltype(as_position_independent_swizzle_layout(ScoreLayout{}));
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kValuePanels = kHeadDimV / kPanel;

  struct SharedStorage {
    alignas(1024) Element key[kKeys * kHeadDim];
    alignas(1024) Element value[kKeys * kHeadDimV];
    alignas(1024) Element query[kQuerySlots][kQueryTile * kHeadDim];
    alignas(1024) Element grad_out[kGradOutSlots][kQueryTile * kHeadDimV];
    alignas(1024) Element grad_scores[kGradScoreSlots][kQueryTile * kKeys];  // dS
    alignas(128) float probabilities[kQueryTile * kKeys];                    // in accumulator order
    alignas(128) float score_start[kQuerySlots][kQueryTile];
    alignas(128) float grad_score_start[kGradOutSlots][kQueryTile];
    alignas(128) float query_scale[kQuerySlots][kQueryTile];  // if deterministic
    alignas(128) float key_scale[kHeadDim];                   // if deterministic
    Barrier item_full, item_empty;
    Barrier turn_full[kConsumers], turn_empty[kConsumers];      // between keepers and consumers
    Barrier query_full[kQuerySlots], query_empty[kQuerySlots];  // score_start, query_scale, step
    Barrier grad_out_full[kGradOutSlots], grad_out_empty[kGradOutSlots];  // grad_score_start
    Barrier probabilities_full, probabilities_empty;  // from the first consumer to the second
    Barrier grad_scores_full[kGradScoreSlots], grad_scores_empty[kGradScoreSlots];  // and back
    Item<kKeys> item;
    Turn<kKeys> turn[kConsumers];
    QueryStep step[kQuerySlots];
    // For the step in each slot the tile of [B, Hq, Mq * kQueryTiles] to which its dQ is to be added.
    int sums_tile[kQuerySlots];
    // A bit for each key of the item, then for each value: whether it is not finite and some query
    // sees it. It is zero in `key` or `value` then.
    uint32_t not_finite[2 * kKeys / 32];
    bool any_not_finite;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace rrattn::cuda::sm90::backward::wide
