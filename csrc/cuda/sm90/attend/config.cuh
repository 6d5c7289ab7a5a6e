// Tile sizes, shared memory and workspace of block-sparse attention on Hopper.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "../../common/row_order.cuh"
#include "../../common/span_bounds.cuh"
#include "../common/barrier.cuh"
#include "../common/mask_rows.cuh"
#include "../common/tensor_map.h"

namespace rrattn::cuda::sm90::attend {

using namespace cute;

constexpr int kConsumers = 2;  // warp groups of 64 rows each, together a query block
constexpr int kConsumerThreads = kConsumers * kWarpGroup;
constexpr int kConsumerRows = kBlockSize / kConsumers;

// Keys of a selected block, or with compensation the mean keys of some blocks: what the consumers
// take at a time.
struct KeyTile {
  int first_key;      // of a tile of means -1 - its first block, which is a multiple of kTileN
  bool plain;         // no score is hidden or increased, and the softmax scale is late
  bool bounded;       // FlashMask, if there is one, may hide some of the scores
  bool last;          // of the mask row
  bool last_of_keys;  // no tile of keys follows in the row

  __device__ static KeyTile of_means(int first_block, bool last) {
    return {-1 - first_block, false, false, last, true};
  }
  __device__ bool is_of_means() const { return first_key < 0; }
  __device__ int first_block() const { return -1 - first_key; }
};

// Shared memory (227 KB): the query block, and tiles of kTileN keys and of as many values.
// Smaller tiles, a second query block and multicast to clusters are slower: see docs/tuning.md.
template <typename Element_, int kHeadDim_, int kHeadDimV_>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;                  // of queries and keys
  static constexpr int kHeadDimV = kHeadDimV_;                // of values and out
  static constexpr int kTileN = kHeadDimV <= 128 ? 128 : 64;  // out has 96 or 128 registers there
  static constexpr int kTilesPerBlock = kBlockSize / kTileN;
  static constexpr int kMeanWords = kTileN / 32;  // of the block mask, for a tile of means
  // As many slots as there is room for, but for 1 KB of barriers and the like. Keys are held until their
  // softmax is sure to fit, values are needed a tile later: where one more tile has room, it is of keys.
  static constexpr int kKeyBytes = kTileN * kHeadDim * sizeof(Element);
  static constexpr int kValueBytes = kTileN * kHeadDimV * sizeof(Element);
  static constexpr int kSlotBytes =
      226 * 1024 - kBlockSize * kHeadDim * static_cast<int>(sizeof(Element));
  static constexpr int kValueSlots = kSlotBytes / (kKeyBytes + kValueBytes);
  static constexpr int kKeySlots = (kSlotBytes - kValueSlots * kValueBytes) / kKeyBytes;
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
                           Shape<Int<kConsumerRows>, Int<kHeadDimV>, Int<kTileN>>, GMMA::Major::K,
                           GMMA::Major::MN>()));
  // All three lie in panels of 64 columns, for head size 96 of 32, as the copies bring them; the layout
  // of a value tile is the transposed view.
  static constexpr int kPanelColumns = kHeadDim % kPanel == 0 ? kPanel : kNarrowPanel;
  using RowsAtom = std::conditional_t<kPanelColumns == kPanel, GMMA::Layout_K_SW128_Atom<Element>,
                                      GMMA::Layout_K_SW64_Atom<Element>>;
  using ColumnsAtom =
      std::conditional_t<kPanelColumns == kPanel, GMMA::Layout_MN_SW128_Atom<Element>,
                         GMMA::Layout_MN_SW64_Atom<Element>>;
  using QueryLayout =
      decltype(tile_to_shape(RowsAtom{}, Shape<Int<kConsumerRows>, Int<kHeadDim>>{}));
  using KeyLayout = decltype(tile_to_shape(RowsAtom{}, Shape<Int<kTileN>, Int<kHeadDim>>{}));
  using ValueLayout =
      decltype(tile_to_shape(ColumnsAtom{}, Shape<Int<kHeadDimV>, Int<kTileN>>{}, Step<_2, _1>{}));
  // For the same scores by products of a single warp: the instruction, and where elements lie.
  using WarpScoreMma =
      std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                         SM80_16x8x16_F32BF16BF16F32_TN, SM80_16x8x16_F32F16F16F32_TN>;
  using QueryOffsets = decltype(as_position_independent_swizzle_layout(QueryLayout{}));
  using KeyOffsets = decltype(as_position_independent_swizzle_layout(KeyLayout{}));
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kValuePanels = kHeadDimV / kPanelColumns;

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kConsumerRows * kHeadDim];
    alignas(1024) Element key[kKeySlots][kTileN * kHeadDim];
    alignas(1024) Element value[kValueSlots][kTileN * kHeadDimV];
    Barrier row_full, row_empty;
    Barrier query_full[kConsumers], query_empty[kConsumers];
    Barrier key_full[kKeySlots], key_empty[kKeySlots];
    Barrier value_full[kValueSlots], value_empty[kValueSlots];
    Barrier value_uncleared[kValueSlots];  // values that are there, but still to be cleared
    RowItem row;
    KeyTile tile[kKeySlots];  // in the key slot
    uint32_t stood_in_for[kKeySlots]
                         [kMeanWords];  // if that is one of means: those that are not hidden
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

struct Workspace {
  SpanBounds* block_bounds;  // [B, bounds heads, Mk]
  int* next_item;
  RowOrder order;
  void *query, *key, *value;  // copies of what no tensor map can describe; else empty
  // With compensation:
  Rows mean_key, mean_value;  // [B, Mk, Hkv, D], [B, Mk, Hkv, Dv]
  uint32_t* stood_in_for;     // [B, Hq, Mq, words]

  Workspace(Arena& arena, const AttendParams& params)
      : block_bounds(arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize))),
        next_item(arena.take<int>(1)),
        order(arena, params) {
    const TensorShape query_shape = query_shape_of(params.visibility, params.heads);
    const TensorShape key_shape = key_shape_of(params.visibility, params.heads);
    const TensorShape value_shape = value_shape_of(params.visibility, params.heads);
    query = arena.take<uint16_t>(elements_to_pack(params.query, query_shape));
    key = arena.take<uint16_t>(elements_to_pack(params.key, key_shape));
    value = arena.take<uint16_t>(elements_to_pack(params.value, value_shape));
    if (!params.compensate) return;
    const Visibility& visibility = params.visibility;
    const auto take_means = [&](const TensorShape& shape) -> Rows {
      const int64_t row_stride = shape.num_heads * shape.head_dim;
      const int64_t batch_stride = shape.seqlen * row_stride;
      void* data = arena.take<uint16_t>(shape.batch * batch_stride);
      return {data, batch_stride, row_stride, shape.head_dim};
    };
    mean_key = take_means(means_of(key_shape));
    mean_value = take_means(means_of(value_shape));
    stood_in_for = arena.take<uint32_t>(visibility.batch * visibility.num_heads *
                                        visibility.num_m_blocks() * visibility.num_mask_words());
  }

  // The shape of the means of keys or values of this shape.
  static TensorShape means_of(TensorShape shape) {
    shape.seqlen = ceil_div(shape.seqlen, kBlockSize);
    return shape;
  }
};

}  // namespace rrattn::cuda::sm90::attend
