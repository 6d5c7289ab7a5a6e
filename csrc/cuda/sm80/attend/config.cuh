// Tile sizes, shared memory and workspace of block-sparse attention on GPUs from Ampere on.
#pragma once

#include "../../common/launch.cuh"
#include "../../common/ragged_plan.cuh"
#include "../../common/row_blocks.cuh"
#include "../../common/row_order.cuh"
#include "../../common/span_bounds.cuh"
#include "../common/tile_table.h"
#include "../common/warp_product.cuh"

namespace rrattn::cuda::sm80::attend {

// A thread block has 128 queries, of which a warp has 32: each fragment of keys and values that it
// loads serves two products. With values of more than 128 columns it has 16, since out alone would take
// all registers. Two thread blocks share a multiprocessor where memory allows, so that the softmax of
// one runs beside the products of the other.
//
// Tiles of 32 keys leave the loop enough registers at head size 128; with 64 it spills. FlashAttention-2's
// time over ours on an H100, at head size 128, half of the blocks of 32,768 and 131,072 tokens: two
// slots 1.07 and 1.10, one 1.03 and 1.07, four 0.99 and 1.04.
template <typename Element_, int kHeadDim_, int kHeadDimV_, TileTable kTable>
struct KernelTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;    // of queries and keys
  static constexpr int kHeadDimV = kHeadDimV_;  // of values and out
  static constexpr int kWarps = kHeadDimV > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kMinBlocks = kHeadDimV > 128 ? 1 : 2;
  static constexpr int kWarpRows = kBlockSize / kWarps;
  static constexpr int kTileN =
      kHeadDim == 64 || (kHeadDim == 256 && kTable != TileTable::k99KB) ? 64 : 32;
  // Tiles of keys and of values that there is room for, in both thread blocks of a multiprocessor.
  static constexpr int kSlots =
      kHeadDim == 64 || (kHeadDim == 128 && kTable != TileTable::k99KB) ? 2 : 1;
  static constexpr int kTilesPerBlock = kBlockSize / kTileN;

  struct SharedStorage {
    alignas(kTileAlignment) Element query[kBlockSize * kHeadDim];
    alignas(kTileAlignment) Element key[kSlots][kTileN * kHeadDim];
    alignas(kTileAlignment) Element value[kSlots][kTileN * kHeadDimV];
    MaskRow row;  // see share_row
  };
  static_assert(sizeof(SharedStorage) <= shared_bytes(kTable));
};

// Keys of a selected block, or with compensation the means of some blocks. In one number, since those
// under way take registers.
class KeyTile {
 public:
  KeyTile() = default;
  // plain: no score is hidden or increased, and the softmax scale is late. may_be_unseen: it may hold
  // keys that no row sees.
  __device__ static KeyTile of_keys(int first_key, bool plain, bool may_be_unseen) {
    return KeyTile(first_key | (plain ? kPlain : 0) | (may_be_unseen ? kUnseen : 0));
  }
  __device__ static KeyTile of_means(int first_block) { return KeyTile(first_block | kMeans); }
  __device__ KeyTile before(int keys) const { return KeyTile(bits_ - keys); }
  __device__ static KeyTile none() { return KeyTile(-1); }

  __device__ bool is_none() const { return bits_ < 0; }
  __device__ bool is_of_means() const { return bits_ & kMeans; }
  __device__ bool is_plain() const { return bits_ & kPlain; }
  __device__ bool may_be_unseen() const { return bits_ & kUnseen; }
  __device__ int first() const { return bits_ & ~(kMeans | kPlain | kUnseen); }  // key or block

 private:
  static constexpr int kMeans = 1, kPlain = 2, kUnseen = 4;  // below all multiples of a tile's keys
  __device__ explicit KeyTile(int bits) : bits_(bits) {}
  int bits_;
};

struct Workspace {
  SpanBounds* block_bounds;  // [B, bounds heads, Mk]
  RowOrder order;
  // With compensation:
  Rows mean_key, mean_value;  // [B, Mk, Hkv, D], [B, Mk, Hkv, Dv]
  uint32_t* stood_in_for;     // [B, Hq, Mq, words]

  Workspace(Arena& arena, const AttendParams& params)
      : block_bounds(arena.take<SpanBounds>(params.visibility.num_span_bounds(kBlockSize))),
        order(arena, params) {
    const Visibility& visibility = params.visibility;
    if (!params.compensate) return;
    const auto take_means = [&](int64_t head_dim) -> Rows {
      const int64_t row_stride = params.heads.num_heads_k * head_dim;
      const int64_t batch_stride = visibility.num_n_blocks() * row_stride;
      void* data = arena.take<uint16_t>(visibility.batch * batch_stride);
      return {data, batch_stride, row_stride, head_dim};
    };
    mean_key = take_means(params.heads.head_dim);
    mean_value = take_means(params.heads.head_dim_v);
    stood_in_for = arena.take<uint32_t>(visibility.batch * visibility.num_heads *
                                        visibility.num_m_blocks() * visibility.num_mask_words());
  }
};

// What the kernel is launched with.
struct KernelParams {
  AttendParams attend;
  Workspace workspace;
  int num_items = 0;
  int section_heads = 1;  // query heads of a section
  bool aligned_query = false, aligned_key = false, aligned_value = false, aligned_out = false;
  AddedToMeans added_to_means{};  // with compensation
};

// The same for a request of a ragged batch, of which num_items is that of all.
struct RequestParams : KernelParams {
  Pages pages;
  int64_t lse_head_stride = 0;
};

}  // namespace rrattn::cuda::sm80::attend
