// Tile sizes, shared memory and parameters of the gradients of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "../../common/backward/key_sums.cuh"
#include "../../common/backward/workspace.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"
#include "merge_parts.cuh"

namespace rrattn::cuda::sm90::backward {

using namespace cute;
using cuda::backward::KeySums, cuda::backward::kFirstUnderWay, cuda::backward::kNoSums,
    cuda::backward::kSums, cuda::backward::kZerosAtFirst, cuda::backward::num_padded_rows,
    cuda::backward::Place, cuda::backward::usable_scale, cuda::backward::WorkOrder,
    cuda::backward::Workspace;

constexpr int kConsumers = 2;  // warp groups
constexpr int kConsumerThreads = kConsumers * kWarpGroup;
constexpr int kQueryTile = 64;                        // queries of a step
constexpr int kQueryTiles = kBlockSize / kQueryTile;  // tiles of a query block
constexpr uint32_t kStatisticsBytes = kQueryTile * sizeof(float);

// Keys of a key head, against the queries of a part of their walk that selected them: the item
// of work.
template <int kKeys>
struct Item {
  Place<kKeys> place;
  int parts_before;  // that it includes besides its own (merge_parts.cuh)
  bool none_left;    // then there is no item
  bool nothing_selected;
};

// A consumer's turn at the sums of dK and dV of an item's keys (turns.cuh).
template <int kKeys>
struct Turn {
  Place<kKeys> place;
  int slot;        // of the sums
  bool last;       // item of the key tile
  bool any_sums;   // of items before
  bool something;  // to add
};

// A tile of queries of one head, against the keys of the item.
struct QueryStep {
  int first_query;
  int head;      // query head
  bool masked;   // some of its scores may be hidden
  bool bounded;  // perhaps by FlashMask
  bool last;     // of the item
};

// What the kernel is built for: 65 to 128 columns of queries and keys, or of values.
//
// Each consumer has 64 keys. S^T = K Q^T and dP^T = V dO^T lie in registers with the keys as
// rows, so that dV += P^T dO and dK += dS^T Q take P^T and dS^T from there. lse / scale and delta,
// which are to be subtracted, are what the accumulators of S^T and dP^T start from, negated: so the
// subtraction takes neither registers nor time. dQ = dS K takes dS of both consumers from
// shared memory, and each computes half of its columns.
//
// Columns from kUsedColumns on, a multiple of 16, are zeros, with which S and dP take no time. The
// others' products have these columns too: wgmma takes no part of a panel of 64 there.
template <typename Element_, int kUsedColumns_, bool kDeterministic_>
struct KernelTraits {
  using Element = Element_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kUsedColumns = kUsedColumns_;
  static constexpr int kHeadDim = 128;      // of queries and keys
  static constexpr int kHeadDimV = 128;     // of values and out
  static constexpr int kKeys = kBlockSize;  // of an item
  static constexpr int kQuerySlots = 3;     // one is the last step's, whose dQ is not sent yet
  static constexpr int kGradOutSlots = 2;
  static constexpr int kGradScoreSlots = 3;
  static constexpr int kSumsTiles = 1;                        // that are sent at once
  static constexpr int kSumsRows = kSumsTiles * kQueryTile;   // whose first share is stored
  static constexpr int kGradQueryThreads = kConsumerThreads;  // that have dQ of a tile
  static constexpr int kThreads = kConsumerThreads + kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using Consumers = Layout<Shape<Int<kConsumers>, _1, _1>>;
  // S^T and dP^T: [keys, queries] over columns.
  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kBlockSize>, Int<kQueryTile>, Int<kHeadDim>>>(),
      Consumers{}));
  // dV and dK: [keys, columns] over queries.
  using GradKeyMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kBlockSize>, Int<kHeadDim>, Int<kQueryTile>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Consumers{}));
  // dQ: [queries, columns] over keys; the consumers side by side.
  using GradQueryMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kQueryTile>, Int<kHeadDim / kConsumers>, Int<kBlockSize>>,
                           GMMA::Major::MN, GMMA::Major::MN>(),
      Layout<Shape<_1, Int<kConsumers>, _1>>{}));

  // Panels of 64 columns, as the copies bring them; the same memory seen from either side.
  using ColumnsAtom = GMMA::Layout_K_SW128_Atom<Element>;
  using RowsAtom = GMMA::Layout_MN_SW128_Atom<Element>;
  using KeyLayout = decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kBlockSize>, Int<kHeadDim>>{}));
  using KeyLayoutT =
      decltype(tile_to_shape(RowsAtom{}, Shape<Int<kHeadDim>, Int<kBlockSize>>{}, Step<_2, _1>{}));
  using QueryLayout =
      decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kQueryTile>, Int<kHeadDim>>{}));
  using QueryLayoutT =
      decltype(tile_to_shape(RowsAtom{}, Shape<Int<kHeadDim>, Int<kQueryTile>>{}, Step<_2, _1>{}));
  using ScoreLayout =
      decltype(tile_to_shape(RowsAtom{}, Shape<Int<kQueryTile>, Int<kBlockSize>>{}));
  using ScoreOffsets = decltype(as_position_independent_swizzle_layout(ScoreLayout{}));
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kValuePanels = kHeadDimV / kPanel;

  struct SharedStorage {
    alignas(1024) Element key[kBlockSize * kHeadDim];
    alignas(1024) Element value[kBlockSize * kHeadDim];
    alignas(1024) Element query[kQuerySlots][kQueryTile * kHeadDim];
    alignas(1024) Element grad_out[kGradOutSlots][kQueryTile * kHeadDim];
    alignas(1024) Element grad_scores[kGradScoreSlots][kQueryTile * kBlockSize];  // dS
    alignas(128) uint32_t grad_query[kQueryTile * kHeadDim];  // in accumulator order
    alignas(128) float score_start[kQuerySlots][kQueryTile];
    alignas(128) float grad_score_start[kGradOutSlots][kQueryTile];
    alignas(128) float query_scale[kQuerySlots][kQueryTile];  // if deterministic
    alignas(128) float key_scale[kHeadDim];                   // if deterministic
    Barrier item_full, item_empty;
    Barrier turn_full[kConsumers], turn_empty[kConsumers];      // between keepers and consumers
    Barrier query_full[kQuerySlots], query_empty[kQuerySlots];  // score_start, query_scale, step
    Barrier grad_out_full[kGradOutSlots], grad_out_empty[kGradOutSlots];  // grad_score_start
    Barrier grad_scores_full[kGradScoreSlots];
    Barrier sums_full, sums_empty;  // between the consumers and the writer
    Item<kKeys> item;
    Turn<kKeys> turn[kConsumers];
    QueryStep step[kQuerySlots];
    // For each step the tile of [B, Hq, Mq * kQueryTiles] to which its dQ is to be added; < 0: no
    // step is left.
    int sums_tile[kQuerySlots];
    // A bit for each key of the item, then for each value: whether it is not finite and some query
    // sees it. It is zero in `key` or `value` then.
    uint32_t not_finite[2 * kBlockSize / 32];
    bool any_not_finite;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Copies, in the workspace, of what no tensor map can describe.
struct PackedRows {
  void *query, *key, *value, *grad_out;

  PackedRows(Arena& arena, const BackwardParams& params) {
    const Visibility& visibility = params.visibility;
    const auto take = [&](const Rows& rows, const TensorShape& shape) {
      return arena.take<uint16_t>(elements_to_pack(rows, shape));
    };
    query = take(params.query, query_shape_of(visibility, params.heads));
    key = take(params.key, key_shape_of(visibility, params.heads));
    value = take(params.value, value_shape_of(visibility, params.heads));
    grad_out = take(params.grad_out, out_shape_of(visibility, params.heads));
  }
};

// What the kernel is launched with.
struct KernelParams {
  BackwardParams backward;
  CUtensorMap query, key, value, grad_out;
  Workspace workspace;
  KeySums key_sums;
  const MergedItem* items;  // (merge_parts.cuh), or null: those of the order
  const int* num_items;     // of these
  WorkOrder order;
  bool aligned_grad_key, aligned_grad_value, aligned_grad_query;
};

}  // namespace rrattn::cuda::sm90::backward
