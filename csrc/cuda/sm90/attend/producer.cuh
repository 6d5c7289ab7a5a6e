// The producer warps of block-sparse attention. The first takes rows of the block mask and copies
// the keys that their bits select, and with compensation tiles of mean keys after them. The others
// follow it row by row and copy the values and the queries. So each waits only for room for what it
// copies itself.
#pragma once

#include "../../common/bit_walk.cuh"
#include "../../common/block_masking.cuh"
#include "../../common/heads.cuh"
#include "../../common/work_order.cuh"
#include "../common/tensor_copy.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::attend {

// What the kernel is launched with.
struct KernelParams {
  AttendParams attend;
  CUtensorMap query, key, value;
  const SpanBounds* block_bounds;
  int* next_item;
  int num_items;
  int section_heads;  // query heads of a section
  bool aligned_out;
  // With compensation:
  CUtensorMap mean_key, mean_value;
  const uint32_t* stood_in_for;  // [B, Hq, Mq, words]
  // Before score_scale, for how many keys it stands: to each mean, and besides to that of the last
  // block, which may have fewer.
  float added_to_mean, added_to_last_mean;
};

// The mask row of an item; whether it has any tiles is not known yet. Query blocks go from the
// last, under the diagonal the longest, to the first.
__device__ inline RowItem row_of_item(const KernelParams& params, int item) {
  const int num_m_blocks = static_cast<int>(params.attend.visibility.num_m_blocks());
  const int num_heads = static_cast<int>(params.attend.visibility.num_heads);
  const WorkPlace place =
      place_of_item(item, params.num_items / num_m_blocks, num_m_blocks, params.section_heads);
  const int m_block = num_m_blocks - 1 - place.block;
  return {place.head * num_m_blocks + m_block, m_block, place.head % num_heads,
          place.head / num_heads, false};
}

// The blocks of a row that its bits select and that it sees, from the last to the first. All lanes
// of a warp call it together.
template <bool kCompensate>
class RowBlocks {
 public:
  __device__ RowBlocks(const KernelParams& params, const RowItem& row)
      : visibility_(params.attend.visibility),
        bounds_(span_bounds_of(visibility_, kBlockSize, params.block_bounds, row.batch, row.head)),
        m_block_(row.m_block),
        plain_end_(params.attend.softmax_scale > kLateScalesAbove<kCompensate>
                       ? first_hidden_key(visibility_, m_block_) / kBlockSize
                       : 0),
        seen_end_(visibility_.causal && visibility_.shift() % kBlockSize != 0
                      ? end_key(visibility_, m_block_) / kBlockSize
                      : INT_MAX),
        walk_(params.attend.block_mask + row.index * visibility_.num_mask_words(),
              end_block(visibility_, m_block_)) {}

  // The next block; < 0: none is left.
  __device__ int next() {
    do {
      n_block_ = walk_.next();
      if (n_block_ < 0 || bounds_ == nullptr) break;
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
  // The end of the keys that the last row may see, when causal.
  __device__ static int end_key(const Visibility& visibility, int m_block) {
    const int64_t end_row =
        min((static_cast<int64_t>(m_block) + 1) * kBlockSize, visibility.seqlen_q);
    return static_cast<int>(end_row + visibility.shift());
  }
  // The end of the blocks that hold such keys, causal or not.
  __device__ static int end_block(const Visibility& visibility, int m_block) {
    if (!visibility.causal) return static_cast<int>(visibility.num_n_blocks());
    return (end_key(visibility, m_block) + kBlockSize - 1) / kBlockSize;
  }

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
template <typename Traits>
class RowMeans {
 public:
  __device__ RowMeans(const KernelParams& params, const RowItem& row)
      : num_words_(static_cast<int>(params.attend.visibility.num_mask_words())),
        words_(params.stood_in_for + static_cast<int64_t>(row.index) * num_words_) {
    const int end = static_cast<int>(end_under_diagonal(params.attend.visibility, row.m_block));
    first_tile_ = (end + Traits::kTileN - 1) / Traits::kTileN;
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
    return (first_tile_ + tile_) * Traits::kTileN;
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
    for (int word = 0; word < Traits::kMeanWords; ++word) {
      const int at = tile * Traits::kMeanWords + word;
      own_words_[word] = tile < end_tile && at < num_words_ ? words_[at] : 0;
      any |= own_words_[word];
    }
    filled_tiles_ = __ballot_sync(~0u, any != 0);
  }

  const int num_words_;
  const uint32_t* words_;
  int first_tile_, tile_ = 0;
  uint32_t own_words_[Traits::kMeanWords], filled_tiles_;
};

// Copies a tile of keys, or of values.
template <typename Traits, int kPanels>
__device__ void copy_tile(typename Traits::Element* to, const CUtensorMap& map, int first_key,
                          int key_head, int batch, Barrier& full) {
  full.arrive_and_expect(kPanels * kPanel * Traits::kTileN * sizeof(typename Traits::Element));
  copy_rows<kPanels>(to, map, Traits::kTileN, first_key, key_head, batch, full);
}

// Copies the tiles of mean keys of a row.
template <typename Traits>
__device__ void produce_mean_keys(const KernelParams& params, const RowItem& row, int key_head,
                                  RingPosition<Traits::kSlots>& keys,
                                  typename Traits::SharedStorage& shared) {
  RowMeans<Traits> means(params, row);
  for (int block = means.next(); block >= 0;) {
    uint32_t words[Traits::kMeanWords];
#pragma unroll
    for (int word = 0; word < Traits::kMeanWords; ++word) words[word] = means.word(word);
    const int next = means.next();
    shared.key_empty[keys.slot].wait(keys.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int word = 0; word < Traits::kMeanWords; ++word)
        shared.stood_in_for[keys.slot][word] = words[word];
      shared.tile[keys.slot] = KeyTile::of_means(block, next < 0);
      copy_tile<Traits, Traits::kPanels>(shared.key[keys.slot], params.mean_key, block, key_head,
                                         row.batch, shared.key_full[keys.slot]);
    }
    keys.advance();
    block = next;
  }
}

// Takes rows, and copies their keys.
template <typename Traits, bool kCompensate>
__device__ void produce_keys(const KernelParams& params, typename Traits::SharedStorage& shared) {
  const int group = static_cast<int>(group_size(params.attend.visibility, params.attend.heads));
  const bool leader = threadIdx.x % 32 == 0;
  RingPosition<1> rows;
  RingPosition<Traits::kSlots> keys;
  for (;;) {
    const int item = take_item(params.next_item);
    shared.row_empty.wait(rows.parity ^ 1);  // until all have read the last row
    rows.advance();
    if (item >= params.num_items) {
      if (leader) {
        shared.row.index = -1;
        shared.row_full.arrive();
      }
      return;
    }
    RowItem row = row_of_item(params, item);
    const int key_head = row.head / group;
    RowBlocks<kCompensate> blocks(params, row);
    int n_block = blocks.next();
    row.without_tiles = n_block < 0;
    bool means_follow = false;
    if constexpr (kCompensate) {
      means_follow = RowMeans<Traits>(params, row).next() >= 0;
      row.without_tiles = n_block < 0 && !means_follow;
    }
    if (leader) {
      shared.row = row;
      shared.row_full.arrive();
    }
    while (n_block >= 0) {
      const bool plain = blocks.is_plain();
      const int next = blocks.next();
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t) {
        shared.key_empty[keys.slot].wait(keys.parity ^ 1);
        if (leader) {
          const int first_key = n_block * kBlockSize + t * Traits::kTileN;
          const bool last_of_keys = next < 0 && t == 0;
          shared.tile[keys.slot] = {first_key, plain, last_of_keys && !means_follow, last_of_keys};
          copy_tile<Traits, Traits::kPanels>(shared.key[keys.slot], params.key, first_key, key_head,
                                             row.batch, shared.key_full[keys.slot]);
        }
        keys.advance();
      }
      n_block = next;
    }
    if constexpr (kCompensate) {
      produce_mean_keys<Traits>(params, row, key_head, keys, shared);
    }
  }
}

// Calls `produce(row)` for every row that the first producer takes, unless it has no tiles.
template <typename SharedStorage, typename Produce>
__device__ void follow_rows(SharedStorage& shared, const Produce& produce) {
  for (RingPosition<1> rows;; rows.advance()) {
    shared.row_full.wait(rows.parity);
    const RowItem row = shared.row;
    shared.row_empty.arrive();
    if (row.index < 0) return;
    if (!row.without_tiles) produce(row);
  }
}

// kUnseenKeys: values of blocks that may hold such keys go to `clear_values` first.
template <typename Traits, bool kUnseenKeys, bool kCompensate>
__device__ void produce_values(const KernelParams& params, typename Traits::SharedStorage& shared) {
  const int group = static_cast<int>(group_size(params.attend.visibility, params.attend.heads));
  RingPosition<Traits::kSlots> values;
  follow_rows(shared, [&](const RowItem& row) {
    const int key_head = row.head / group;
    RowBlocks<kCompensate> blocks(params, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next()) {
      Barrier* full =
          kUnseenKeys && blocks.may_hold_unseen_keys() ? shared.value_uncleared : shared.value_full;
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t) {
        shared.value_empty[values.slot].wait(values.parity ^ 1);
        if (threadIdx.x % 32 == 0) {
          copy_tile<Traits, Traits::kValuePanels>(shared.value[values.slot], params.value,
                                                  n_block * kBlockSize + t * Traits::kTileN,
                                                  key_head, row.batch, full[values.slot]);
        }
        values.advance();
      }
    }
    if constexpr (kCompensate) {
      RowMeans<Traits> means(params, row);
      for (;;) {
        const int block = means.next();
        if (block < 0) break;
        shared.value_empty[values.slot].wait(values.parity ^ 1);
        if (threadIdx.x % 32 == 0) {
          copy_tile<Traits, Traits::kValuePanels>(shared.value[values.slot], params.mean_value,
                                                  block, key_head, row.batch,
                                                  shared.value_full[values.slot]);
        }
        values.advance();
      }
    }
  });
}

// Zeroes values whose keys no row of the query block sees: a NaN or infinity there, even times a
// probability of 0, would make all rows NaN.
template <typename Traits, bool kCompensate>
__device__ void clear_values(const KernelParams& params, typename Traits::SharedStorage& shared) {
  const Visibility& visibility = params.attend.visibility;
  RingPosition<Traits::kSlots> values;
  uint32_t parities = 0;  // of value_uncleared, a bit for each slot
  follow_rows(shared, [&](const RowItem& row) {
    const int32_t* bounds =
        visibility.row_bounds.data
            ? row_bounds_of(visibility.row_bounds, row.batch, visibility.bounds_head(row.head))
            : nullptr;
    const int64_t first_row = row.m_block * kBlockSize;
    const int64_t last_row = min(first_row + kBlockSize, visibility.seqlen_q) - 1;
    RowBlocks<kCompensate> blocks(params, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next()) {
      const bool clears = blocks.may_hold_unseen_keys();
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t, values.advance()) {
        if (!clears) continue;
        shared.value_uncleared[values.slot].wait(parities >> values.slot & 1);
        parities ^= 1u << values.slot;
        const int64_t first_key = n_block * kBlockSize + t * Traits::kTileN;
        for (int i = static_cast<int>(threadIdx.x) % 32; i < Traits::kTileN; i += 32) {
          if (first_key + i >= visibility.seqlen_k ||  // zero already, from the copy
              seen_by_rows(visibility, bounds, first_key + i, first_row, last_row)) {
            continue;
          }
          for (int panel = 0; panel < Traits::kValuePanels; ++panel) {
            auto* chunks = reinterpret_cast<uint4*>(shared.value[values.slot] +
                                                    (panel * Traits::kTileN + i) * kPanel);
            constexpr int kChunks = kPanel * sizeof(typename Traits::Element) / sizeof(uint4);
            for (int chunk = 0; chunk < kChunks; ++chunk) chunks[chunk] = make_uint4(0, 0, 0, 0);
          }
        }
        fence_async_proxy_shared();  // wgmma reads what these stores wrote
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.value_full[values.slot].arrive();
      }
    }
    if constexpr (kCompensate) {
      RowMeans<Traits> means(params, row);
      while (means.next() >= 0) values.advance();  // there is nothing to clear in means
    }
  });
}

template <typename Traits>
__device__ void produce_queries(const KernelParams& params,
                                typename Traits::SharedStorage& shared) {
  constexpr uint32_t kBytes = kConsumerRows * Traits::kHeadDim * sizeof(typename Traits::Element);
  const bool leader = threadIdx.x % 32 == 0;
  RingPosition<1> queries;
  follow_rows(shared, [&](const RowItem& row) {
    const auto first_query = [&](int consumer) {
      return row.m_block * kBlockSize + consumer * kConsumerRows;
    };
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      if (!leader) continue;
      prefetch_rows<Traits::kPanels>(params.query, first_query(consumer), row.head, row.batch);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      // Until it is done with the last ones.
      shared.query_empty[consumer].wait(queries.parity ^ 1);
      if (!leader) continue;
      shared.query_full[consumer].arrive_and_expect(kBytes);
      copy_rows<Traits::kPanels>(shared.query[consumer], params.query, kConsumerRows,
                                 first_query(consumer), row.head, row.batch,
                                 shared.query_full[consumer]);
    }
    queries.advance();
  });
}

}  // namespace rrattn::cuda::sm90::attend
