// What a row of the block mask selects: its key blocks, and with compensation the tiles of means that
// stand in for others.
#pragma once

#include <cmath>

#include "attend_sections.cuh"
#include "bit_walk.cuh"
#include "block_masking.cuh"

namespace rrattn::cuda {

// Products are multiplied by a softmax scale above this together with log2(e), as their probabilities
// are computed: `late` below. Not by one that is not positive, where the largest product is not the
// largest score; nor, with compensation, by one so small that what is added to products (their
// scores' increase, divided by it) has no room in a float.
template <bool kCompensate>
constexpr float kLateScalesAbove = kCompensate ? 0x1p-64f : 0;

// What is added to the product of a query and a mean key, before it is scaled: the mean stands for
// all keys of its block, so that its probability counts as many times.
struct AddedToMeans {
  float added;       // of a whole block
  float added_last;  // of the last block, besides
};
inline AddedToMeans added_to_means(const AttendParams& attend) {
  const double scale = attend.softmax_scale > kLateScalesAbove<true> ? attend.softmax_scale : 1;
  const auto added = [&](int64_t num_keys) {
    return static_cast<float>(std::log(static_cast<double>(num_keys)) / scale);
  };
  const Visibility& visibility = attend.visibility;
  const int64_t last_keys = visibility.seqlen_k - (visibility.num_n_blocks() - 1) * kBlockSize;
  return {added(kBlockSize), added(last_keys) - added(kBlockSize)};
}

// The blocks of a row that its bits select and that it sees, from the last to the first. All lanes
// of a warp call it together. kFlashMask: whether there may be one.
template <bool kCompensate, bool kFlashMask = true>
class RowBlocks {
 public:
  // `block_bounds`: of all key blocks. `past_end`: whether what is copied of the last block past its keys
  // is not zero.
  __device__ RowBlocks(const AttendParams& attend, const SpanBounds* block_bounds,
                       const MaskRow& row, bool past_end = false)
      : visibility_(attend.visibility),
        bounds_(kFlashMask
                    ? span_bounds_of(visibility_, kBlockSize, block_bounds, row.batch, row.head)
                    : nullptr),
        m_block_(row.m_block),
        plain_end_(attend.softmax_scale > kLateScalesAbove<kCompensate>
                       ? first_hidden_key(visibility_, m_block_) / kBlockSize
                       : 0),
        seen_end_(visibility_.causal && (past_end || visibility_.shift() % kBlockSize != 0)
                      ? end_key(visibility_, m_block_) / kBlockSize
                      : INT_MAX),
        walk_(attend.block_mask + row.index * visibility_.num_mask_words(),
              end_block(visibility_, m_block_)) {}

  // The next block; < 0: none is left.
  __device__ int next() {
    do {
      n_block_ = walk_.next();
      if (!kFlashMask || n_block_ < 0 || bounds_ == nullptr) break;
      kind_ = classify_block(visibility_, bounds_, m_block_, n_block_);
    } while (kind_ == BlockKind::kHidden);
    return n_block_;
  }

  // Whether the last block returned has no hidden score, and the softmax scale is late.
  __device__ bool is_plain() const { return n_block_ < plain_end_ && kind_ == BlockKind::kOpen; }

  // Whether the last block returned may hold keys that no row sees.
  __device__ bool may_hold_unseen_keys() const {
    return kind_ == BlockKind::kPartial || n_block_ >= seen_end_;
  }

 private:
  const Visibility& visibility_;
  const SpanBounds* bounds_;
  const int m_block_, plain_end_, seen_end_;
  BlockKind kind_ = BlockKind::kOpen;
  BitWalk walk_;
  int n_block_ = -1;
};

// The tiles of means of a row in which some stand in for their blocks, from the last to the first.
// All lanes of a warp call it together; each holds the bits of one of 32 tiles, so that the memory is
// waited for once in a row and not before each tile.
template <int kTileN>
class RowMeans {
  static constexpr int kWords = kTileN / 32;  // of the block mask, for a tile

 public:
  __device__ RowMeans(const Visibility& visibility, const uint32_t* stood_in_for,
                      const MaskRow& row)
      : num_words_(static_cast<int>(visibility.num_mask_words())),
        words_(stood_in_for + static_cast<int64_t>(row.index) * num_words_) {
    const int end = static_cast<int>(end_under_diagonal(visibility, row.m_block));
    first_tile_ = (end + kTileN - 1) / kTileN;
    load();
  }

  // The first block of the next tile; < 0: none is left.
  __device__ int next() {
    while (filled_tiles_ == 0) {
      if (first_tile_ <= 0) return -1;
      load();
    }
    tile_ = 31 - __clz(filled_tiles_);
    filled_tiles_ ^= 1u << tile_;
    return (first_tile_ + tile_) * kTileN;
  }

  // Of the tile returned last, a bit for each mean that stands in for its block: a word of them.
  __device__ uint32_t word(int word) const { return __shfl_sync(~0u, own_words_[word], tile_); }

 private:
  // The 32 tiles before first_tile_.
  __device__ void load() {
    const int end_tile = first_tile_;
    first_tile_ = max(first_tile_ - 32, 0);
    const int tile = first_tile_ + static_cast<int>(threadIdx.x) % 32;
    uint32_t any = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const int at = tile * kWords + word;
      own_words_[word] = tile < end_tile && at < num_words_ ? words_[at] : 0;
      any |= own_words_[word];
    }
    filled_tiles_ = __ballot_sync(~0u, any != 0);
  }

  const int num_words_;
  const uint32_t* words_;
  int first_tile_, tile_ = 0;
  uint32_t own_words_[kWords], filled_tiles_;
};

}  // namespace rrattn::cuda
