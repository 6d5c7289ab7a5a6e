// Tile sizes, shared memory and workspace of the gradients of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "barrier.cuh"
#include "run_bounds.cuh"
#include "tensor_map.h"
#include "turns.cuh"

namespace rrattn::cuda {

using namespace cute;

constexpr int kBackwardGroups = 2;                              // consumer warp groups
constexpr int kBackwardThreads = kBackwardGroups * kWarpGroup;  // consumer threads
constexpr int kQueryTile = 64;                                  // queries of a step
constexpr int kQueryTiles = kBlockSize / kQueryTile;            // tiles of a query block

// Each consumer group has 64 keys. S^T = K Q^T and dP^T = V dO^T lie in registers with the keys as
// rows, so that dV += P^T dO and dK += dS^T Q take P^T and dS^T from there. lse / scale and delta,
// which are to be subtracted, are what the accumulators of S^T and dP^T start from, negated: so the
// subtraction takes neither registers nor time. dQ = dS K takes dS of both groups from shared
// memory, and each group computes half of its columns.
template <typename Element_, bool kDeterministic_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kHeadDim = 128;
  static constexpr int kQueryStages = 3;  // one is the last step's, whose dQ is not sent yet
  static constexpr int kGradOutStages = 2;
  static constexpr int kGradScoreStages = 3;
  static constexpr int kSumsStages = kQueryStages + 1;  // the writer may be one step behind
  static constexpr int kThreads = kBackwardThreads + kWarpGroup;
  // A thread block starts with 168 registers a thread, which the warp groups share out again.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using Groups = Layout<Shape<Int<kBackwardGroups>, _1, _1>>;
  // S^T and dP^T: [keys, queries] over columns.
  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kBlockSize>, Int<kQueryTile>, Int<kHeadDim>>>(),
      Groups{}));
  // dV and dK: [keys, columns] over queries.
  using GradKeyMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float,
                           Shape<Int<kBlockSize>, Int<kHeadDim>, Int<kQueryTile>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Groups{}));
  // dQ: [queries, columns] over keys; the groups side by side.
  using GradQueryMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kQueryTile>, Int<kHeadDim / kBackwardGroups>, Int<kBlockSize>>,
                           GMMA::Major::MN, GMMA::Major::MN>(),
      Layout<Shape<_1, Int<kBackwardGroups>, _1>>{}));

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
  static constexpr uint32_t kKeyBytes = kBlockSize * kHeadDim * sizeof(Element);
  static constexpr uint32_t kQueryBytes = kQueryTile * kHeadDim * sizeof(Element);
  static constexpr uint32_t kStatisticsBytes = kQueryTile * sizeof(float);

  struct SharedStorage {
    alignas(1024) Element key[kBlockSize * kHeadDim];
    alignas(1024) Element value[kBlockSize * kHeadDim];
    alignas(1024) Element query[kQueryStages][kQueryTile * kHeadDim];
    alignas(1024) Element grad_out[kGradOutStages][kQueryTile * kHeadDim];
    alignas(1024) Element grad_scores[kGradScoreStages][kQueryTile * kBlockSize];  // dS
    alignas(128) uint32_t grad_query[kQueryTile * kHeadDim];  // in accumulator order
    alignas(128) float score_start[kQueryStages][kQueryTile];
    alignas(128) float grad_score_start[kGradOutStages][kQueryTile];
    alignas(128) float query_scale[kQueryStages][kQueryTile];  // if deterministic
    alignas(128) float key_scale[kHeadDim];                    // if deterministic
    Barrier item_full, item_empty;
    Barrier query_full[kQueryStages], query_empty[kQueryStages];  // score_start, query_scale, step
    Barrier grad_out_full[kGradOutStages], grad_out_empty[kGradOutStages];  // grad_score_start
    Barrier grad_scores_full[kGradScoreStages];
    Barrier sums_full, sums_empty;  // between the consumers and the writer
    struct Item {
      int turn;  // < 0: no item is left
      bool nothing_selected;
    } item;
    struct Step {
      int first_query;
      int head;     // query head
      bool masked;  // some of its scores may be hidden
      bool last;    // of the item
    } step[kQueryStages];
    // For each step the tile of [B, Hq, Mq * kQueryTiles] to which its dQ is to be added; < 0: no
    // step is left.
    int sums_tile[kSumsStages];
    // A bit for each key of the item, then for each value: whether it is not finite and some query
    // sees it. It is zero in `key` or `value` then.
    uint32_t not_finite[2 * kBlockSize / 32];
    bool any_not_finite;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// grad_query holds the sums of dS K. In float32 they depend on the order in which the key blocks
// are added. In deterministic mode they are therefore whole numbers of 32 bits, in units of
// 1 / (query_scale * key_scale): powers of 2 such that no sum, of any row and column, reaches 2^30.
// The scales come from the bound
//
//   |sum_j dS[i, j] K[j, c]| <= sum_j P[i, j] (|dO_i| |V_j| + |delta_i|) |K[j, c]|,
//
// where the probabilities add up to 1. Twice the bound is allowed for, so the resolution is 2^-29
// of the bound.
struct BackwardWorkspace {
  RunBounds* block_bounds;    // [B, bounds heads, Mk]
  uint32_t* transposed_mask;  // [B, Hq, Mk, ceil(Mq / 32)]
  float* score_start;         // [B, Hq, Mq, kBlockSize]: -lse / scale, or P = 0 if nothing is seen
  float* grad_score_start;    // the same: -delta
  float* query_scale;         // the same, if deterministic
  uint32_t* grad_query;  // [B, Hq, Mq, tiles of a block, kQueryTile * 128], in accumulator order
  int* next_item;
  // If deterministic: the largest over all keys, as the bits of a float32 that is not negative.
  uint32_t* key_column;                  // |K|: [B, Hkv, 128]
  uint32_t* value_norm;                  // |V_j|^2: [B, Hkv]
  float* key_scale;                      // [B, Hkv, 128]
  void *query, *key, *value, *grad_out;  // copies of what no tensor map can describe

  BackwardWorkspace(Arena& arena, const BackwardParams& params) {
    const Visibility& visibility = params.visibility;
    const int64_t rows =
        visibility.batch * visibility.num_heads * visibility.num_m_blocks() * kBlockSize;
    const int64_t key_heads = visibility.batch * params.heads.num_heads_k;
    block_bounds = arena.take<RunBounds>(visibility.num_run_bounds(kBlockSize));
    transposed_mask =
        arena.take<uint32_t>(visibility.batch * visibility.num_heads * visibility.num_n_blocks() *
                             ceil_div(visibility.num_m_blocks(), kMaskWordBits));
    score_start = arena.take<float>(rows);
    grad_score_start = arena.take<float>(rows);
    query_scale = arena.take<float>(params.deterministic ? rows : 0);
    grad_query = arena.take<uint32_t>(rows * 128);
    next_item = arena.take<int>(1);
    key_column = arena.take<uint32_t>(params.deterministic ? key_heads * 128 : 0);
    value_norm = arena.take<uint32_t>(params.deterministic ? key_heads : 0);
    key_scale = arena.take<float>(params.deterministic ? key_heads * 128 : 0);
    const TensorShape query_shape = query_shape_of(params.visibility, params.heads);
    const TensorShape key_shape = key_shape_of(params.visibility, params.heads);
    query = arena.take<uint16_t>(elements_to_pack(params.query, query_shape));
    key = arena.take<uint16_t>(elements_to_pack(params.key, key_shape));
    value = arena.take<uint16_t>(elements_to_pack(params.value, key_shape));
    grad_out = arena.take<uint16_t>(elements_to_pack(params.grad_out, query_shape));
  }
};

// The softmax scale, or 2^-100 where it is closer to 0: lse / scale must be a number.
__device__ inline float usable_scale(float scale) {
  return fabsf(scale) >= 0x1p-100f ? scale : 0x1p-100f;
}

// What the kernel is launched with.
struct BackwardKernelParams {
  BackwardParams backward;
  CUtensorMap query, key, value, grad_out;
  BackwardWorkspace workspace;
  int num_items;
  int section_heads;  // key heads whose key blocks are processed together
  bool aligned_grad_key, aligned_grad_value, aligned_grad_query;
};

// The place of a turn. Key blocks go from the first, under the diagonal the longest, to the last.
struct BackwardPlace {
  int n_block, key_head, batch;

  __device__ BackwardPlace(const BackwardKernelParams& params, int turn) {
    const int num_n_blocks = static_cast<int>(params.backward.visibility.num_n_blocks());
    const int num_heads_k = static_cast<int>(params.backward.heads.num_heads_k);
    const TurnPlace place =
        place_of_turn(turn, params.num_items / num_n_blocks, num_n_blocks, params.section_heads);
    n_block = place.block;
    key_head = place.head % num_heads_k;
    batch = place.head / num_heads_k;
  }
};

}  // namespace rrattn::cuda
