// Block-sparse flash attention on GPUs from Ampere on.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv],
//   block_mask [B, Hq, Mq, words], sink [Hq] if given  ->  out [B, Lq, Hq, Dv], lse [B, Hq, Lq]
//
// A thread block takes a row of the block mask, all of whose warps walk its bits. A tile of values is
// copied while the products of its keys are computed, and the next tile of keys while the softmax
// and the products with the values are.
//
// Probabilities are relative to a base of their row: its largest score in the first tile in which it
// sees anything. Larger scores leave the base as it is while there is room above it, so out is hardly
// ever rescaled.
#pragma once

#include "../../common/attend_sections.cuh"
#include "../../common/heads.cuh"
#include "../../common/softmax.cuh"
#include "../../common/store_row.cuh"
#include "../../common/work_order.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm80::attend {

// How far scores may be above their row's base, in units of log2: probabilities stay far below
// float16's largest number.
constexpr float kRoom = 10;

// The tiles of a row, keys first, then with compensation means, both from the last to the first.
template <typename Traits, bool kCompensate, bool kFlashMask>
class RowTiles {
 public:
  __device__ RowTiles(const KernelParams& params, const MaskRow& row)
      : blocks_(params.attend, params.workspace.block_bounds, row),
        means_(params.attend.visibility, kCompensate ? params.workspace.stood_in_for : nullptr,
               row) {
    // In local memory: the walk is needed once in a block, and the loop has no registers to spare.
    asm volatile("" ::"l"(&blocks_) : "memory");
  }

  __device__ KeyTile next() {
    if (tile_.first() % kBlockSize != 0 && !tile_.is_of_means()) {
      return tile_ = tile_.before(Traits::kTileN);
    }
    const int n_block = blocks_.next();
    if (n_block >= 0) {
      return tile_ = KeyTile::of_keys((n_block + 1) * kBlockSize - Traits::kTileN,
                                      blocks_.is_plain(), blocks_.may_hold_unseen_keys());
    }
    if constexpr (kCompensate) {
      const int first_block = means_.next();
      if (first_block >= 0) return tile_ = KeyTile::of_means(first_block);
    }
    return KeyTile::none();
  }

 private:
  struct NoMeans {
    __device__ NoMeans(const Visibility&, const uint32_t*, const MaskRow&) {}
  };

  RowBlocks<kCompensate, kFlashMask> blocks_;
  std::conditional_t<kCompensate, RowMeans<Traits::kTileN>, NoMeans> means_;
  KeyTile tile_ = KeyTile::of_keys(0, false, false);  // the last one
};

// kRagged: the row is one of a request of a ragged batch, where there is no FlashMask.
template <typename Traits, bool kUnseenKeys, bool kCompensate, bool kRagged>
class RowAttention {
  using Params = std::conditional_t<kRagged, RequestParams, KernelParams>;
  static constexpr bool kFlashMask = kUnseenKeys && !kRagged;  // whether there may be one
  using Tiles = RowTiles<Traits, kCompensate, kFlashMask>;
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kM = Traits::kWarpRows / 16;  // products side by side, of 16 rows
  static constexpr int kTileN = Traits::kTileN;
  static constexpr int kRowScores = kTileN / 4;  // of a row, in one thread
  static constexpr int kRowOuts = Traits::kHeadDimV / 4;
  using Scores = RowSums<kTileN>;
  using Out = RowSums<Traits::kHeadDimV>;
  static constexpr int kWords = kTileN / 32;

 public:
  __device__ RowAttention(const Params& params, const MaskRow& row, SharedStorage& shared)
      : params_(params),
        row_(row),
        shared_(shared),
        query_(shared_address(shared.query)),
        key_(shared_address(shared.key)),
        value_(shared_address(shared.value)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows),
        key_head_(row.head /
                  static_cast<int>(group_size(params.attend.visibility, params.attend.heads))),
        first_key_(head_of(params.attend.key, key_head_) +
                   KeyCopy::offset(params.attend.key.row_stride)),
        first_value_(head_of(params.attend.value, key_head_) +
                     ValueCopy::offset(params.attend.value.row_stride)) {
    const float scale = params.attend.softmax_scale;
    product_scale_ = scale > kLateScalesAbove<kCompensate> ? 1 : scale;
    score_scale_ = (scale > kLateScalesAbove<kCompensate> ? scale : 1) * kLog2E;
  }

  __device__ void run() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      clear(out_[m]);
      row_base_[m][0] = row_base_[m][1] = -INFINITY;
      row_sum_[m][0] = row_sum_[m][1] = 0;
    }
    Tiles tiles(params_, row_);
    const KeyTile first = tiles.next();
    if (!first.is_none()) {
      copy_queries();
      if constexpr (Traits::kSlots == 1) {
        take_tiles(tiles, first);
      } else {
        take_tiles_ahead(tiles, first);
      }
    }
    if (params_.attend.sink != nullptr) add_sink();
#pragma unroll
    for (int m = 0; m < kM; ++m) write(m);
  }

 private:
  __device__ const Element* head_of(const Rows& rows, int head) const {
    return static_cast<const Element*>(rows.data) + row_.batch * rows.batch_stride +
           head * rows.head_stride;
  }

  using QueryCopy = TileCopy<kBlockSize, Traits::kHeadDim, Traits::kThreads>;
  using KeyCopy = TileCopy<kTileN, Traits::kHeadDim, Traits::kThreads>;
  using ValueCopy = TileCopy<kTileN, Traits::kHeadDimV, Traits::kThreads>;

  __device__ void copy_queries() const {
    const AttendParams& attend = params_.attend;
    const int first_row = row_.m_block * kBlockSize;
    const int64_t row_stride = attend.query.row_stride;
    QueryCopy::start(
        query_,
        head_of(attend.query, row_.head) + first_row * row_stride + QueryCopy::offset(row_stride),
        row_stride, static_cast<int>(attend.visibility.seqlen_q) - first_row,
        static_cast<int>(attend.heads.head_dim), params_.aligned_query);
  }
  __device__ void copy_keys(KeyTile tile, int slot) const {
    const AttendParams& attend = params_.attend;
    copy<KeyCopy>(tile, key_in(slot), first_key_, attend.key, params_.workspace.mean_key,
                  attend.heads.head_dim, params_.aligned_key);
  }
  __device__ void copy_values(KeyTile tile, int slot) const {
    const AttendParams& attend = params_.attend;
    copy<ValueCopy>(tile, value_in(slot), first_value_, attend.value, params_.workspace.mean_value,
                    attend.heads.head_dim_v, params_.aligned_value);
  }
  // `first`: the thread's chunk of the first key.
  template <typename Copy>
  __device__ void copy(KeyTile tile, uint32_t to, const Element* first, const Rows& rows,
                       const Rows& means, int64_t head_dim, bool aligned) const {
    const Visibility& visibility = params_.attend.visibility;
    if (kCompensate && tile.is_of_means()) {
      Copy::start(to,
                  head_of(means, key_head_) + tile.first() * means.row_stride +
                      Copy::offset(means.row_stride),
                  means.row_stride, static_cast<int>(visibility.num_n_blocks()) - tile.first(),
                  static_cast<int>(head_dim), true);
    } else {
      const Element* from = first + tile.first() * rows.row_stride;
      // A tile lies in one page. One that begins past the last row may have none.
      if constexpr (kRagged) {
        if (tile.first() < visibility.seqlen_k) from += params_.pages.offset(rows, tile.first());
      }
      Copy::start(to, from, rows.row_stride, static_cast<int>(visibility.seqlen_k) - tile.first(),
                  static_cast<int>(head_dim), aligned);
    }
  }
  __device__ uint32_t key_in(int slot) const {
    return key_ + slot * static_cast<uint32_t>(sizeof(shared_.key[0]));
  }
  __device__ uint32_t value_in(int slot) const {
    return value_ + slot * static_cast<uint32_t>(sizeof(shared_.value[0]));
  }

  // With room for one tile: values are copied beside the products with their keys, and the next keys
  // beside the softmax and the products with the values.
  __device__ void take_tiles(Tiles& tiles, KeyTile tile) {
    copy_keys(tile, 0);
    commit_copies();
    while (!tile.is_none()) {
      wait_for_copies<0>();
      __syncthreads();  // its keys are there, and all warps are done with the last values
      copy_values(tile, 0);
      commit_copies();
      Scores scores[kM];
      multiply_keys(0, scores);
      wait_for_copies<0>();
      __syncthreads();  // the values are there, and all warps are done with the keys
      const KeyTile now = tile;
      tile = tiles.next();
      if (!tile.is_none()) copy_keys(tile, 0);
      commit_copies();
      attend(now, 0, scores);
    }
  }

  // With room for more: keys and values are copied kSlots - 1 tiles ahead.
  __device__ void take_tiles_ahead(Tiles& tiles, KeyTile tile) {
    constexpr int kAhead = Traits::kSlots - 1;
    KeyTile under_way[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      under_way[i] = i == 0 ? tile : tiles.next();
      begin_copies(under_way[i], i);
    }
    int slot = 0;
    while (!under_way[0].is_none()) {
      wait_for_copies<kAhead - 1>();
      __syncthreads();  // the tile is there, and all warps are done with the last one
      const KeyTile now = under_way[0];
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) under_way[i] = under_way[i + 1];
      under_way[kAhead - 1] = tiles.next();
      begin_copies(under_way[kAhead - 1], slot == 0 ? kAhead : slot - 1);
      Scores scores[kM];
      multiply_keys(slot, scores);
      attend(now, slot, scores);
      slot = slot == kAhead ? 0 : slot + 1;
    }
  }
  // Nothing, if there is no tile.
  __device__ void begin_copies(KeyTile tile, int slot) const {
    if (!tile.is_none()) {
      copy_keys(tile, slot);
      copy_values(tile, slot);
    }
    commit_copies();
  }

  // What follows the products with a tile's keys.
  __device__ void attend(KeyTile tile, int slot, Scores (&scores)[kM]) {
    if (kUnseenKeys && tile.may_be_unseen()) clear_values(tile, slot);
    softmax(tile, scores);
    multiply_values(slot, scores);
  }

  // scores = Q K^T.
  __device__ void multiply_keys(int slot, Scores (&scores)[kM]) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) clear(scores[m]);
    multiply_add<Element, Traits::kHeadDim>(scores,
                                            FirstOperand<kBlockSize, false>(query_, first_row_),
                                            SecondOperand<kTileN, false>(key_in(slot), 0));
  }

  // out += P V, with P in the scores.
  __device__ void multiply_values(int slot, const Scores (&scores)[kM]) {
    multiply_add<Element, kTileN>(out_, Probabilities{scores},
                                  SecondOperand<kTileN, true>(value_in(slot), 0));
  }

  // The first operand of P V: scores, in the order in which a product leaves them, are fragments of it.
  struct Probabilities {
    const Scores (&scores)[kM];

    __device__ void load(uint32_t (&to)[4], int i, int k) const {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int at = k / 2 + part * 2;
        to[part] = pack_two<Element>(scores[i / 16](at), scores[i / 16](at + 1));
      }
    }
  };

  // Turns scores into probabilities, and adds them to the sums.
  __device__ void softmax(KeyTile tile, Scores (&scores)[kM]) {
    if (!tile.is_plain()) adjust(tile, scores);
    float largest[kM][2];
    bool fit = true;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[m][half] = score_scale_ * largest_score(scores[m], half);
        fit &= largest[m][half] <= row_base_[m][half] + kRoom;
      }
    }
    if (__any_sync(~0u, !fit)) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
        raise_bases_to(m, {quad_max(largest[m][0]), quad_max(largest[m][1])});
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float base = finite(row_base_[m][half]);
        float parts[2] = {};
#pragma unroll
        for (int i = 0; i < kRowScores; ++i) {
          float& score = scores[m](accumulator_index(half, i));
          score = exp2_approx(fmaf(score, score_scale_, -base));
          parts[i % 2] += score;
        }
        row_sum_[m][half] += parts[0] + parts[1];
      }
    }
  }

  // The largest of the thread's scores of a row.
  __device__ static float largest_score(const Scores& scores, int half) {
    float largest = scores(accumulator_index(half, 0));
#pragma unroll
    for (int i = 1; i < kRowScores; ++i)
      largest = fmaxf(largest, scores(accumulator_index(half, i)));
    return largest;
  }

  // Brings the sums and out of 16 rows to the bases that are at least these.
  __device__ void raise_bases_to(int m, const float (&least)[2]) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& base = row_base_[m][half];
      const float larger = fmaxf(base, least[half]);
      factor[half] = exp2_approx(base - finite(larger));
      base = larger;
      row_sum_[m][half] *= factor[half];
    }
#pragma unroll
    for (int i = 0; i < kRowOuts; ++i) {
      out_[m](accumulator_index(0, i)) *= factor[0];
      out_[m](accumulator_index(1, i)) *= factor[1];
    }
  }

  // Lets the sink join the sums of the rows, once in each quad.
  __device__ void add_sink() {
    const float sink = params_.attend.sink[row_.head] * kLog2E;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      raise_bases_to(m, {sink, sink});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (lane_ % 4 == 0) row_sum_[m][half] += exp2_approx(sink - finite(row_base_[m][half]));
      }
    }
  }

  __device__ static float finite(float base) { return base == -INFINITY ? 0 : base; }

  // Scales products by a scale that is not late, makes hidden scores -infinity, and adds to those of
  // means the logarithm of how many keys they stand for.
  __device__ void adjust(KeyTile tile, Scores (&scores)[kM]) const {
    const bool of_means = kCompensate && tile.is_of_means();
    const int first = lane_ % 4 * 2;  // column of the thread
    const int last = of_means ? static_cast<int>(params_.attend.visibility.num_n_blocks()) - 1 -
                                    tile.first() - first
                              : -1;  // of the thread's columns, the last block's
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t hidden = of_means ? hidden_means(tile) : hidden_keys(tile, m, half);
#pragma unroll
        for (int i = 0; i < kRowScores; ++i) {
          float& score = scores[m](accumulator_index(half, i));
          float adjusted = score * product_scale_;
          if (of_means) {
            adjusted += params_.added_to_means.added;
            if (accumulator_column(i) == last) adjusted += params_.added_to_means.added_last;
          }
          score = hidden >> i & 1 ? -INFINITY : adjusted;
        }
      }
    }
  }

  // Bit i: score i of one of the thread's rows is hidden.
  __device__ uint32_t hidden_keys(KeyTile tile, int m, int half) const {
    const Visibility& visibility = params_.attend.visibility;
    const RowBounds& layout = visibility.row_bounds;
    const int first = tile.first() + lane_ % 4 * 2;
    const int end_key = static_cast<int>(visibility.seqlen_k);
    const int token = row_token(m, half);
    int end = visibility.causal ? min(token + static_cast<int>(visibility.shift()) + 1, end_key)
                                : end_key;
    // Rows past the end see nothing: what an unseen key holds must not show in their warp. Where no key is
    // unseen they do as they would in the request's own call, since they may raise the bases of their warp.
    const bool unseen_keys = kUnseenKeys && (!kRagged || may_leave_unseen_keys(visibility));
    if (unseen_keys && token >= static_cast<int>(visibility.seqlen_q)) end = 0;
    const int keys = max(end - first, 0);
    const int visible = keys / 8 * 2 + min(keys % 8, 2);  // accumulator_column(i) < keys
    uint32_t hidden = visible < 32 ? ~0u << visible : 0;
    // Where FlashMask hides nothing, reading the bounds of all keys would take longer than the rest of
    // the tile.
    if (kFlashMask && tile.may_be_unseen() && layout.data != nullptr) {
      const int32_t* bounds = row_bounds_of(layout, row_.batch, visibility.bounds_head(row_.head));
#pragma unroll 4
      for (int i = 0; i < kRowScores; ++i) {
        const int key = first + accumulator_column(i);
        if (key >= end_key) break;
        const KeyBounds key_bounds = load_key_bounds(layout, visibility.causal, bounds, key);
        hidden |= static_cast<uint32_t>(key_bounds.mask(token)) << i;
      }
    }
    return hidden;
  }

  // The same of a tile of means, for all rows.
  __device__ uint32_t hidden_means(KeyTile tile) const {
    const int num_words = static_cast<int>(params_.attend.visibility.num_mask_words());
    const uint32_t* words =
        params_.workspace.stood_in_for + static_cast<int64_t>(row_.index) * num_words;
    uint32_t hidden = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      // Bits 0, 1, 8, 9, 16, 17, 24 and 25 close ranks.
      const int at = tile.first() / 32 + word;
      uint32_t bits = ~(at < num_words ? words[at] : 0) >> lane_ % 4 * 2 & 0x03030303;
      bits = (bits | bits >> 6) & 0x000f000f;
      bits = (bits | bits >> 12) & 0xff;
      hidden |= bits << word * 8;
    }
    return hidden;
  }

  // Zeroes values whose keys no row of the query block sees: a NaN or infinity there, even times a
  // probability of 0, would make all rows NaN.
  __device__ void clear_values(KeyTile tile, int slot) const {
    const Visibility& visibility = params_.attend.visibility;
    const int32_t* bounds =
        kFlashMask && visibility.row_bounds.data
            ? row_bounds_of(visibility.row_bounds, row_.batch, visibility.bounds_head(row_.head))
            : nullptr;
    const int64_t first_row = row_.m_block * kBlockSize;
    const int64_t last_row = min(first_row + kBlockSize, visibility.seqlen_q) - 1;
    static_assert(kTileN <= Traits::kThreads);
    const int i = static_cast<int>(threadIdx.x);
    const int64_t key = tile.first() + i;
    if (i < kTileN && key < visibility.seqlen_k &&
        !seen_by_rows(visibility, bounds, key, first_row, last_row)) {
      for (int column = 0; column < Traits::kHeadDimV; column += 8) {
        *reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared_.value[slot]) +
                                  tile_offset<kTileN>(i, column)) = make_uint4(0, 0, 0, 0);
      }
    }
    __syncthreads();
  }

  // Divides by the row sums and writes out and lse.
  __device__ void write(int m) {
    const AttendParams& attend = params_.attend;
    const Visibility& visibility = attend.visibility;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum_[m][half]);
      const float scale = sum == 0 ? 0 : 1 / sum;
      const int64_t token = row_token(m, half);
      auto* out_row =
          const_cast<Element*>(head_of(attend.out, row_.head)) + token * attend.out.row_stride;
      if (token < visibility.seqlen_q && lane_ % 4 == 0) {
        attend.lse[head_lse() + token] =
            sum == 0 ? -INFINITY : (row_base_[m][half] + log2f(sum)) * kLn2;
      }
      store_row(out_[m], half, scale, out_row, token < visibility.seqlen_q,
                static_cast<int>(attend.heads.head_dim_v), params_.aligned_out);
    }
  }

  // Where the log-sum-exps of the head begin.
  __device__ int64_t head_lse() const {
    if constexpr (kRagged) return row_.head * params_.lse_head_stride;
    const Visibility& visibility = params_.attend.visibility;
    return (row_.batch * visibility.num_heads + row_.head) * visibility.seqlen_q;
  }

  __device__ int row_token(int m, int half) const {
    return row_.m_block * kBlockSize + first_row_ + m * 16 + lane_ / 4 + half * 8;
  }

  const Params& params_;
  const MaskRow& row_;
  SharedStorage& shared_;
  const uint32_t query_, key_, value_;  // in shared memory
  const int lane_, first_row_, key_head_;
  const Element *first_key_, *first_value_;  // the thread's chunks of them
  float product_scale_, score_scale_;        // the latter in units of log2
  Out out_[kM];
  float row_base_[kM][2];  // that the sums are relative to
  float row_sum_[kM][2];   // the thread's share
};

// The thread block's row in shared memory, for a loop that has no registers for it.
template <typename SharedStorage>
__device__ inline const MaskRow& share_row(const MaskRow& row, SharedStorage& shared) {
  if (threadIdx.x == 0) shared.row = row;
  __syncthreads();
  return shared.row;
}

// kUnseenKeys: whether some blocks may hold keys that no row sees. Their values are then zeroed.
// kCompensate: whether means stand in for blocks.
template <typename Traits, bool kUnseenKeys, bool kCompensate>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    attend_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(kTileAlignment) char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const MaskRow row = row_of_item(static_cast<int>(blockIdx.x), params.workspace.order.places,
                                  params.attend.visibility, params.num_items, params.section_heads);
  using Attention = RowAttention<Traits, kUnseenKeys, kCompensate, false>;
  if constexpr (kUnseenKeys) {
    Attention(params, share_row(row, shared), shared).run();
  } else {
    Attention(params, row, shared).run();
  }
}

// Brings what is needed of a request's call to shared memory, and returns when it is there.
__device__ inline void copy_call(const AttendCall& call, const KernelParams& all,
                                 RequestParams& params) {
  if (threadIdx.x == 0) {
    params.aligned_query = all.aligned_query, params.aligned_key = all.aligned_key;
    params.aligned_value = all.aligned_value, params.aligned_out = all.aligned_out;
    params.pages = call.pages;
    params.lse_head_stride = call.lse_head_stride;
  }
  const auto* from = reinterpret_cast<const uint64_t*>(&call.params);
  auto* to = reinterpret_cast<uint64_t*>(&params.attend);
  static_assert(sizeof(AttendParams) % sizeof(uint64_t) == 0);
  for (unsigned i = threadIdx.x; i < sizeof(AttendParams) / sizeof(uint64_t); i += blockDim.x)
    to[i] = from[i];
  __syncthreads();
}

// The same for the requests of a ragged batch. There are thread blocks for the most query blocks that it
// may have, of which those for the longest rows of a section come first.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    ragged_attend_kernel(const __grid_constant__ KernelParams all,
                         const __grid_constant__ RaggedPlan plan) {
  extern __shared__ __align__(kTileAlignment) char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  __shared__ alignas(16) char params_memory[sizeof(RequestParams)];
  auto& params = *reinterpret_cast<RequestParams*>(params_memory);
  const int num_row_blocks = plan.num_row_blocks();
  const int num_heads = static_cast<int>(all.attend.visibility.num_heads);
  if (static_cast<int>(blockIdx.x) >= num_row_blocks * num_heads) return;
  const WorkPlace place =
      place_of_item(static_cast<int>(blockIdx.x), num_heads, num_row_blocks, all.section_heads);
  const RequestPart part = plan.row_blocks[place.block];
  copy_call(plan.attend[part.request], all, params);
  const int num_m_blocks = static_cast<int>(params.attend.visibility.num_m_blocks());
  const MaskRow row{place.head * num_m_blocks + part.index, part.index, place.head, 0};
  RowAttention<Traits, true, false, true>(params, share_row(row, shared), shared).run();
}

}  // namespace rrattn::cuda::sm80::attend
