// Tile sizes and shared memory of the gradients of block-sparse attention on GPUs from Ampere on.
#pragma once

#include "../../common/backward/key_sums.cuh"
#include "../../common/backward/workspace.cuh"
#include "../common/thread_here.cuh"
#include "../common/tile_table.h"
#include "../common/warp_product.cuh"

namespace rrattn::cuda::sm80::backward {

using rrattn::cuda::backward::KeySums, rrattn::cuda::backward::WorkOrder,
    rrattn::cuda::backward::Workspace;

// A query block that selected the keys of an item and sees them.
struct PlannedBlock {
  const void *query, *grad_out;  // its first row
  int first_query;               // < 0: there is none, the plan is at its end
  int head;                      // query head
  bool masked;                   // some of its scores may be hidden
};

// What the first warp has planned of an item: a ring of blocks.
template <int kAtOnce_>
struct Plan {
  static constexpr int kAtOnce = kAtOnce_;  // blocks of the mask that are looked at
  static constexpr int kAhead = 4;  // blocks that are planned at least, the one under way included
  static constexpr int kSlots = 2 * kAtOnce;
  static_assert(kAhead + kAtOnce <= kSlots && kMaskWordBits % kAtOnce == 0);

  PlannedBlock blocks[kSlots];
  int planned;  // blocks so far
  // The blocks from `begin` to before `end` of this head come next, and then those to before
  // end_of_head of the heads before end_head.
  int head, end_head;
  int begin, end, end_of_head;
  const uint32_t* mask_row;  // of the transposed mask, for this head
  uint32_t mask_word;        // of that row, the word that holds the bit of the block before `end`
};

// The tiles of a thread block, and how many of its warps share the rows of each product, while the others
// share its columns.
struct Tiles {
  int keys;     // of an item of work
  int queries;  // of a step
  int warps;
  int score_warps;  // S and dP: [queries, keys]
  int key_warps;    // dV and dK: [keys, columns]
  int query_warps;  // dQ: [queries, columns]
  int query_slots;  // 2: the next step's queries are copied during this one
  int grad_out_slots;
  int planned_at_once = 16;  // Plan::kAtOnce
};

// A warp's sums of dK and dV take half of its registers, and S and dP a quarter. What it reads from shared
// memory for a product is least where its part of the result is square.
template <int kHeadDim, int kHeadDimV, TileTable kTable>
constexpr Tiles tiles() {
  constexpr bool kSmall = kTable == TileTable::k99KB;
  if (kHeadDim == 64) {
    return kSmall ? Tiles{128, 64, 8, 2, 4, 4, 2, 2} : Tiles{128, 128, 8, 4, 4, 4, 2, 2, 8};
  }
  if (kHeadDim == 128) {
    return kSmall ? Tiles{64, 64, 4, 2, 2, 2, 2, 1} : Tiles{128, 64, 8, 2, 4, 2, 2, 2};
  }
  if (kSmall) return {32, 32, 4, 2, 2, 2, 1, 1};
  const int slots = kTable == TileTable::k227KB || kHeadDimV == 128 ? 2 : 1;
  return {64, 64, 8, 4, 2, 2, slots, slots};
}

template <typename Element_, int kHeadDim_, int kHeadDimV_, bool kDeterministic_, TileTable kTable>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of queries and keys
  static constexpr int kHeadDimV = kHeadDimV_;  // of values and out
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr Tiles kTiles = tiles<kHeadDim, kHeadDimV, kTable>();
  static constexpr int kKeys = kTiles.keys, kQueries = kTiles.queries;
  static constexpr int kThreads = kTiles.warps * 32;
  using Place = rrattn::cuda::backward::Place<kKeys>;
  using KeyTurn = rrattn::cuda::backward::KeyTurn<kKeys>;
  // Tiles of P and dS have whole panels.
  static constexpr int kScoreColumns = kKeys < kPanel ? kPanel : kKeys;

  // The part of a product of [kAllRows, kAllColumns] that a warp has, of kRowWarps that share the rows.
  template <int kAllRows, int kAllColumns, int kRowWarps>
  struct Part {
    static constexpr int kRows = kAllRows / kRowWarps;
    static constexpr int kColumns = kAllColumns / (kTiles.warps / kRowWarps);
    static constexpr int kFragments = kRows / 16;
    static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
    using Sums = RowSums<kColumns>[kFragments];
    __device__ static int first_row() { return first_row(static_cast<int>(threadIdx.x)); }
    __device__ static int first_column() { return first_column(static_cast<int>(threadIdx.x)); }
    __device__ static int first_row(int thread) { return thread / 32 % kRowWarps * kRows; }
    __device__ static int first_column(int thread) { return thread / 32 / kRowWarps * kColumns; }
  };
  using ScorePart = Part<kQueries, kKeys, kTiles.score_warps>;
  using GradValuePart = Part<kKeys, kHeadDimV, kTiles.key_warps>;
  using GradKeyPart = Part<kKeys, kHeadDim, kTiles.key_warps>;
  using GradQueryPart = Part<kQueries, kHeadDim, kTiles.query_warps>;

  struct SharedStorage {
    alignas(kTileAlignment) Element key[kKeys * kHeadDim];
    alignas(kTileAlignment) Element value[kKeys * kHeadDimV];
    alignas(kTileAlignment) Element query[kTiles.query_slots][kQueries * kHeadDim];
    alignas(kTileAlignment) Element grad_out[kTiles.grad_out_slots][kQueries * kHeadDimV];
    alignas(kTileAlignment) Element probabilities[kQueries * kScoreColumns];  // P
    alignas(kTileAlignment) Element grad_scores[kQueries * kScoreColumns];    // dS
    alignas(16) float score_start[2][kQueries];
    alignas(16) float grad_score_start[2][kQueries];
    bool any_item, any_not_finite;
    Place place;
    Plan<kTiles.planned_at_once> plan;
    KeyTurn turn;
    // A bit for each key of the item, then for each value: whether it is not finite and some query
    // sees it. It is zero in `key` or `value` then.
    uint32_t not_finite[2 * kKeys / 32];
  };
  static_assert(sizeof(SharedStorage) <= shared_bytes(kTable));
};

// What the kernel is launched with.
struct KernelParams {
  BackwardParams backward;
  Workspace workspace;
  KeySums key_sums;
  // Of the items of all key tiles but the last late_tiles of each head: these come after all others,
  // their walks whole.
  WorkOrder order;
  int late_tiles;
  float score_scale;  // in units of log2
  bool aligned_query, aligned_key, aligned_value, aligned_grad_out;
  bool aligned_grad_query, aligned_grad_key, aligned_grad_value;

  __host__ __device__ int num_items() const {
    return order.num_items + order.num_heads * late_tiles;
  }
};

}  // namespace rrattn::cuda::sm80::backward
