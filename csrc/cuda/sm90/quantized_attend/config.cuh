// Tiles, shared memory and workspace of block-sparse attention in eight bits on Hopper.
//
// Tiles of queries, keys and values lie in the workspace as the main loop has them in shared memory:
// in the order in which wgmma reads them, swizzle and all, with their scales behind. So each comes
// with one plain bulk copy, and nothing is turned around in the main loop.
#pragma once

// Out has eight columns more than values, a shape that CuTe has on demand only: so this file is to be
// included before all others that include CuTe.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "../../../core/quantization.h"
#include "../../common/launch.cuh"
#include "../../common/row_order.cuh"
#include "../../common/span_bounds.cuh"
#include "../common/barrier.cuh"
#include "../common/mask_rows.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

using namespace cute;

constexpr int kConsumers = 2;  // warp groups of 64 rows each, together a query block
constexpr int kConsumerThreads = kConsumers * kWarpGroup;
constexpr int kConsumerRows = kBlockSize / kConsumers;

// The keys of a block have positions in its tile of values. A thread's scores of keys 2t, 2t + 1,
// 2t + 8 and 2t + 9 of sixteen, which the first product leaves with lane t of a quad, are then four
// neighbours 4t to 4t + 3, which the second product takes from that lane.
__host__ __device__ constexpr int position_of_key(int key) {
  return key / 16 * 16 + key % 8 / 2 * 4 + key / 8 % 2 * 2 + key % 2;
}
__host__ __device__ constexpr int key_of_position(int position) {
  return position / 16 * 16 + position / 2 % 2 * 8 + position / 4 % 4 * 2 + position % 2;
}

template <int kHeadDim>
struct alignas(1024) QueryTile {
  int8_t numbers[kBlockSize * kHeadDim];
  float scale[kBlockSize];       // of a row's whole numbers, in the exponent of 2; NaN of a bad row
  float mean_score[kBlockSize];  // of the mean key, to be added to lse
  float base[kBlockSize];        // that the row is expected to need
};

template <int kHeadDim>
struct alignas(1024) KeyTile {
  int8_t numbers[kBlockSize * kHeadDim];
  float scale;
  static constexpr int kBytes = kBlockSize * kHeadDim + 16;  // copies are of multiples of 16
};

template <int kHeadDim>
struct alignas(1024) ValueTile {
  uint8_t numbers[kHeadDim * kBlockSize];  // columns of e4m3, of keys by position
};

// What the consumers must know of a tile of keys.
struct TileNote {
  int first_key;
  bool plain;    // no score is hidden
  bool bounded;  // FlashMask, if there is one, may hide some of the scores
  bool last;     // of the mask row
};

template <typename Element_, int kHeadDim_>
struct KernelTraits {
  using Element = Element_;  // of inputs and out
  static constexpr int kHeadDim = kHeadDim_;
  // Eight columns behind those of the values give the sums of the rounded probabilities: column i has
  // ones for positions 16 i to 16 i + 15.
  static constexpr int kSumColumns = 8;
  static constexpr int kOutColumns = kHeadDim + kSumColumns;
  static constexpr int kKeySlots = kHeadDim == 64 ? 6 : 4, kValueSlots = kHeadDim == 64 ? 6 : 3;
  static constexpr int kQuerySlots = 2;
  static constexpr int kRowSlots = 2;  // of the consumers', and the next one
  // Of bases above the largest score when they are set. More is less often too little later, and takes a
  // bit from probabilities below 2^-14 of the largest: the larger one only for the row's expected base.
  static constexpr int kHeadroom = 2, kLargestHeadroom = 5;
  // Whether scores start from the bits of kWhole, a float to whose bits a whole number below 2^22 is added
  // as to its value: then none is converted. 1.04 to 1.07 times as fast with 128 (half of 131,072 tokens'
  // blocks), 0.87 with 64, whose products are too short for the time that setting the bits takes.
  static constexpr bool kFloatScores = kHeadDim == 128;
  static constexpr float kWhole = 0x1.8p23f;
  static constexpr int kThreads = kConsumerThreads + kWarpGroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using ScoreMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<int8_t, int8_t, int32_t,
                           Shape<Int<kConsumerRows>, Int<kBlockSize>, Int<kHeadDim>>>()));
  using OutMma = decltype(make_tiled_mma(
      std::conditional_t<kHeadDim == 64, SM90::GMMA::MMA_64x72x32_F32E4M3E4M3_RS_TN<>,
                         SM90::GMMA::MMA_64x136x32_F32E4M3E4M3_RS_TN<>>()));
  template <typename T>
  using RowAtom =
      std::conditional_t<kHeadDim == 64, GMMA::Layout_K_SW64_Atom<T>, GMMA::Layout_K_SW128_Atom<T>>;
  using QueryLayout =
      decltype(tile_to_shape(RowAtom<int8_t>{}, Shape<Int<kConsumerRows>, Int<kHeadDim>>{}));
  using KeyLayout =
      decltype(tile_to_shape(RowAtom<int8_t>{}, Shape<Int<kBlockSize>, Int<kHeadDim>>{}));
  using ValueLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<float_e4m3_t>{},
                                             Shape<Int<kOutColumns>, Int<kBlockSize>>{}));
  // Where elements of the tiles lie.
  using KeyOffsets = decltype(as_position_independent_swizzle_layout(KeyLayout{}));
  using ValueOffsets = decltype(as_position_independent_swizzle_layout(ValueLayout{}));

  struct alignas(1024) ValueSlot {
    ValueTile<kHeadDim> tile;
    uint8_t ones[kSumColumns * kBlockSize];
  };
  struct SharedStorage {
    QueryTile<kHeadDim> query[kQuerySlots];
    KeyTile<kHeadDim> key[kKeySlots];
    ValueSlot value[kValueSlots];
    Barrier row_full[kRowSlots], row_empty[kRowSlots];
    Barrier query_full[kQuerySlots], query_empty[kQuerySlots];
    Barrier key_full[kKeySlots], key_empty[kKeySlots];
    Barrier value_full[kValueSlots], value_empty[kValueSlots];
    Barrier value_uncleared[kValueSlots];  // values that are there, but still to be cleared
    RowItem row[kRowSlots];
    TileNote note[kKeySlots];  // of the tile in the key slot
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

template <int kHeadDim>
struct Workspace {
  SpanBounds* block_bounds;  // [B, bounds heads, Mk]
  int* next_item;
  RowOrder order;
  float* mean_key;                   // [B, Hkv, D], which is subtracted from the keys
  float* key_variance;               // [B, Hkv, D], of the keys that this is the mean of
  uint32_t* largest_values;          // [B, Hkv, D], the bits of the largest magnitude of a column
  float* value_scale;                // [B, Hkv, D], the power of two that a column is divided by
  QueryTile<kHeadDim>* query_tiles;  // [B, Hq, Mq]
  KeyTile<kHeadDim>* key_tiles;      // [B, Hkv, Mk]
  ValueTile<kHeadDim>* value_tiles;  // [B, Hkv, Mk]

  Workspace(Arena& arena, const AttendParams& params)
      : block_bounds(arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize))),
        next_item(arena.take<int>(1)),
        order(arena, params) {
    const Visibility& visibility = params.visibility;
    const int64_t key_heads = visibility.batch * params.heads.num_heads_k;
    mean_key = arena.take<float>(key_heads * kHeadDim);
    key_variance = arena.take<float>(key_heads * kHeadDim);
    largest_values = arena.take<uint32_t>(key_heads * kHeadDim);
    value_scale = arena.take<float>(key_heads * kHeadDim);
    query_tiles = arena.take<QueryTile<kHeadDim>>(visibility.batch * visibility.num_heads *
                                                  visibility.num_m_blocks());
    key_tiles = arena.take<KeyTile<kHeadDim>>(key_heads * visibility.num_n_blocks());
    value_tiles = arena.take<ValueTile<kHeadDim>>(key_heads * visibility.num_n_blocks());
  }
};

}  // namespace rrattn::cuda::sm90::quantized_attend
