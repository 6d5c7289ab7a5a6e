// Tile sizes, shared memory and workspace of the gradients of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "../../common/heads.cuh"
#include "../../common/span_bounds.cuh"
#include "../../common/work_order.cuh"
#include "../common/tensor_map.h"
#include "../common/wgmma.cuh"

namespace rrattn::cuda::sm90::backward {

using namespace cute;

constexpr int kConsumers = 2;  // warp groups
constexpr int kConsumerThreads = kConsumers * kWarpGroup;
constexpr int kQueryTile = 64;                        // queries of a step
constexpr int kQueryTiles = kBlockSize / kQueryTile;  // tiles of a query block
constexpr uint32_t kStatisticsBytes = kQueryTile * sizeof(float);

// Keys of a key head, against the queries that selected them: the item of work.
struct Item {
  int index;  // < 0: no item is left
  bool nothing_selected;
};

// A tile of queries of one head, against the keys of the item.
struct QueryStep {
  int first_query;
  int head;     // query head
  bool masked;  // some of its scores may be hidden
  bool last;    // of the item
};

// What the kernel is built for: up to 128 columns of queries, keys and values.
//
// Each consumer has 64 keys. S^T = K Q^T and dP^T = V dO^T lie in registers with the keys as
// rows, so that dV += P^T dO and dK += dS^T Q take P^T and dS^T from there. lse / scale and delta,
// which are to be subtracted, are what the accumulators of S^T and dP^T start from, negated: so the
// subtraction takes neither registers nor time. dQ = dS K takes dS of both consumers from
// shared memory, and each computes half of its columns.
template <typename Element_, bool kDeterministic_>
struct KernelTraits {
  using Element = Element_;
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kHeadDim = 128;      // of queries and keys
  static constexpr int kHeadDimV = 128;     // of values and out
  static constexpr int kKeys = kBlockSize;  // of an item
  static constexpr int kQuerySlots = 3;     // one is the last step's, whose dQ is not sent yet
  static constexpr int kGradOutSlots = 2;
  static constexpr int kGradScoreSlots = 3;
  static constexpr int kSumsSlots = kQuerySlots + 1;  // the writer may be one step behind
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
    Barrier query_full[kQuerySlots], query_empty[kQuerySlots];  // score_start, query_scale, step
    Barrier grad_out_full[kGradOutSlots], grad_out_empty[kGradOutSlots];  // grad_score_start
    Barrier grad_scores_full[kGradScoreSlots];
    Barrier sums_full, sums_empty;  // between the consumers and the writer
    Item item;
    QueryStep step[kQuerySlots];
    // For each step the tile of [B, Hq, Mq * kQueryTiles] to which its dQ is to be added; < 0: no
    // step is left.
    int sums_tile[kSumsSlots];
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
struct Workspace {
  SpanBounds* block_bounds;   // [B, bounds heads, Mk]
  uint32_t* transposed_mask;  // [B, Hq, Mk, ceil(Mq / 32)]
  float* score_start;         // [B, Hq, Mq, kBlockSize]: -lse / scale, or P = 0 if nothing is seen
  float* grad_score_start;    // the same: -delta = grad_lse - rowsum(dO * O)
  float* query_scale;         // the same, if deterministic
  uint32_t*
      grad_query;  // [B, Hq, Mq, tiles of a block, kQueryTile * columns], in accumulator order
  int* next_item;
  // If deterministic: the largest over all keys, as the bits of a float32 that is not negative.
  uint32_t* key_column;                  // |K|: [B, Hkv, columns]
  uint32_t* value_norm;                  // |V_j|^2: [B, Hkv]
  float* key_scale;                      // [B, Hkv, columns]
  void *query, *key, *value, *grad_out;  // copies of what no tensor map can describe

  // Columns: the padded head size of queries and keys.
  Workspace(Arena& arena, const BackwardParams& params, int columns) {
    const Visibility& visibility = params.visibility;
    const int64_t rows =
        visibility.batch * visibility.num_heads * visibility.num_m_blocks() * kBlockSize;
    const int64_t key_heads = visibility.batch * params.heads.num_heads_k;
    block_bounds = arena.take<SpanBounds>(visibility.num_span_bounds(kBlockSize));
    transposed_mask =
        arena.take<uint32_t>(visibility.batch * visibility.num_heads * visibility.num_n_blocks() *
                             ceil_div(visibility.num_m_blocks(), kMaskWordBits));
    score_start = arena.take<float>(rows);
    grad_score_start = arena.take<float>(rows);
    query_scale = arena.take<float>(params.deterministic ? rows : 0);
    grad_query = arena.take<uint32_t>(rows * columns);
    next_item = arena.take<int>(1);
    key_column = arena.take<uint32_t>(params.deterministic ? key_heads * columns : 0);
    value_norm = arena.take<uint32_t>(params.deterministic ? key_heads : 0);
    key_scale = arena.take<float>(params.deterministic ? key_heads * columns : 0);
    const auto take_packed = [&](const Rows& rows, const TensorShape& shape) {
      return arena.take<uint16_t>(elements_to_pack(rows, shape));
    };
    query = take_packed(params.query, query_shape_of(visibility, params.heads));
    key = take_packed(params.key, key_shape_of(visibility, params.heads));
    value = take_packed(params.value, value_shape_of(visibility, params.heads));
    grad_out = take_packed(params.grad_out, out_shape_of(visibility, params.heads));
  }
};

// The softmax scale, or 2^-100 where it is closer to 0: lse / scale must be a number.
__device__ inline float usable_scale(float scale) {
  return fabsf(scale) >= 0x1p-100f ? scale : 0x1p-100f;
}

// What the kernel is launched with.
struct KernelParams {
  BackwardParams backward;
  CUtensorMap query, key, value, grad_out;
  Workspace workspace;
  int num_items;
  int section_heads;  // key heads of a section
  bool aligned_grad_key, aligned_grad_value, aligned_grad_query;
};

// The place of an item of kKeys keys, a key block or a part of one. Key blocks go from the first,
// under the diagonal the longest, to the last.
template <int kKeys>
struct Place {
  static constexpr int kParts = kBlockSize / kKeys;  // of a key block

  int part, key_head, batch;  // part: of those of all key blocks

  __device__ Place(const KernelParams& params, int item) {
    const int num_parts = static_cast<int>(params.backward.visibility.num_n_blocks()) * kParts;
    const int num_heads_k = static_cast<int>(params.backward.heads.num_heads_k);
    const WorkPlace place =
        place_of_item(item, params.num_items / num_parts, num_parts, params.section_heads);
    part = place.block;
    key_head = place.head % num_heads_k;
    batch = place.head / num_heads_k;
  }
  __device__ int n_block() const { return part / kParts; }
  __device__ int first_key() const { return part * kKeys; }
};

}  // namespace rrattn::cuda::sm90::backward
