// The producer warps of block-sparse attention. The first takes rows of the block mask and copies
// the keys that their bits select, and with compensation tiles of mean keys after them. The others
// follow it row by row and copy the values and the queries. So each waits only for room for what it
// copies itself.
#pragma once

#include <cutlass/fast_math.h>

#include "../../common/attend_sections.cuh"
#include "../../common/heads.cuh"
#include "../../common/ragged_plan.cuh"
#include "../../common/row_blocks.cuh"
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
  const int* places;  // RowOrder's
  bool aligned_out;
  // With compensation:
  CUtensorMap mean_key, mean_value;
  const uint32_t* stood_in_for;  // [B, Hq, Mq, words]
  AddedToMeans added_to_means;
};

// Of a ragged batch. `attend` has what its requests have in common.
struct RaggedKernelParams : KernelParams {
  RaggedPlan plan;
  const int32_t* cu_seqlens_q;
  const int32_t* block_tables;  // null: no pages
  int table_width;
  cutlass::FastDivmod page_size{1};
  int box_rows;  // of a copy of keys or values: those of a tile, or of a page that has fewer
};

// What the kernels need to know of a row, in a usual call and in a ragged batch.

__device__ inline int num_items_of(const KernelParams& params) { return params.num_items; }
__device__ inline int num_items_of(const RaggedKernelParams& params) {
  return params.plan.num_row_blocks() * static_cast<int>(params.attend.visibility.num_heads);
}

using sm90::row_of_item;  // of a usual call
// The longest of all requests come first.
__device__ inline RowItem row_of_item(const RaggedKernelParams& params, int item) {
  const RaggedPlan& plan = params.plan;
  const WorkPlace place = place_of_item(item, static_cast<int>(params.attend.visibility.num_heads),
                                        plan.num_row_blocks(), params.section_heads);
  const RequestPart part = plan.row_blocks[place.block];
  const Visibility& visibility = plan.attend[part.request].params.visibility;
  return {place.head * static_cast<int>(visibility.num_m_blocks()) + part.index, part.index,
          place.head, part.request, false};
}

__device__ inline const AttendParams& attend_of(const KernelParams& params, const RowItem&) {
  return params.attend;
}
__device__ inline const AttendParams& attend_of(const RaggedKernelParams& params,
                                                const RowItem& row) {
  return params.plan.attend[row.batch].params;
}

// Where the row of queries, or of keys, that is the request's first lies among those that the copies
// know, and in which of their batch entries.
struct Place {
  int row, batch;
};

__device__ inline Place query_place(const KernelParams&, const RowItem& row, int query) {
  return {query, row.batch};
}
__device__ inline Place query_place(const RaggedKernelParams& params, const RowItem& row,
                                    int query) {
  return {params.cu_seqlens_q[row.batch] + query, 0};
}

template <typename Traits>
__device__ inline int first_key_of(int n_block, int tile) {
  return n_block * kBlockSize + tile * Traits::kTileN;
}

// Where the keys of a tile of a block lie.
template <typename Traits>
class TilePlaces {
 public:
  __device__ TilePlaces(const KernelParams&, const RowItem& row, int n_block, int tile)
      : batch_(row.batch), n_block_(n_block), tile_(tile) {}

  // Copies them, or their values, of kPanels panels.
  template <int kPanels>
  __device__ void copy(typename Traits::Element* to, const CUtensorMap& map, int key_head,
                       Barrier& full) const {
    full.arrive_and_expect(kPanels * Traits::kPanelColumns * Traits::kTileN *
                           sizeof(typename Traits::Element));
    copy_rows<kPanels, Traits::kPanelColumns>(
        to, map, Traits::kTileN, first_key_of<Traits>(n_block_, tile_), key_head, batch_, full);
  }

 private:
  int batch_, n_block_, tile_;
};

// In a ragged batch, where those of each box lie, of which a page has one or more: read from the tables
// before there is room for the tile. Past the last key they are whatever lies there, of another request
// or in its last page.
template <typename Traits>
class RaggedTilePlaces {
  static constexpr int kMaxBoxes = Traits::kTileN / kPageUnit;

 public:
  __device__ RaggedTilePlaces(const RaggedKernelParams& params, const RowItem& row, int n_block,
                              int tile)
      : box_rows_(params.box_rows) {
    const bool paged = params.block_tables != nullptr;
    const int32_t* table =
        params.block_tables + static_cast<int64_t>(row.batch) * params.table_width;
    const int first_row = paged ? 0 : params.plan.first_keys[row.batch];
    const int last_key = static_cast<int>(attend_of(params, row).visibility.seqlen_k) - 1;
#pragma unroll
    for (int box = 0; box < kMaxBoxes; ++box) {
      if (box * box_rows_ >= Traits::kTileN) break;
      const int key = first_key_of<Traits>(n_block, tile) + box * box_rows_;
      if (paged) {
        int page, in_page;
        params.page_size(page, in_page, min(key, last_key));
        places_[box] = {in_page, table[page]};
      } else {
        places_[box] = {first_row + key, 0};
      }
    }
  }

  template <int kPanels>
  __device__ void copy(typename Traits::Element* to, const CUtensorMap& map, int key_head,
                       Barrier& full) const {
    full.arrive_and_expect(kPanels * Traits::kPanelColumns * Traits::kTileN *
                           sizeof(typename Traits::Element));
#pragma unroll
    for (int box = 0; box < kMaxBoxes; ++box) {
      if (box * box_rows_ >= Traits::kTileN) break;
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(to + (panel * Traits::kTileN + box * box_rows_) * Traits::kPanelColumns, map,
                 panel * Traits::kPanelColumns, places_[box].row, key_head, places_[box].batch,
                 full);
      }
    }
  }

 private:
  int box_rows_;
  Place places_[kMaxBoxes];
};

template <typename Traits, typename Params>
using TilePlacesOf = std::conditional_t<std::is_same_v<Params, RaggedKernelParams>,
                                        RaggedTilePlaces<Traits>, TilePlaces<Traits>>;

// The blocks of a row. In a ragged batch there is no FlashMask, and what is copied past the last key is
// not zero.
template <bool kCompensate>
__device__ inline RowBlocks<kCompensate> blocks_of(const KernelParams& params, const RowItem& row) {
  return RowBlocks<kCompensate>(params.attend, params.block_bounds, row);
}
template <bool kCompensate>
__device__ inline RowBlocks<kCompensate, false> blocks_of(const RaggedKernelParams& params,
                                                          const RowItem& row) {
  return RowBlocks<kCompensate, false>(attend_of(params, row), nullptr, row, true);
}

// Copies a tile of keys, or of values.
template <typename Traits, int kPanels>
__device__ void copy_tile(typename Traits::Element* to, const CUtensorMap& map, int first_key,
                          int key_head, int batch, Barrier& full) {
  full.arrive_and_expect(kPanels * Traits::kPanelColumns * Traits::kTileN *
                         sizeof(typename Traits::Element));
  copy_rows<kPanels, Traits::kPanelColumns>(to, map, Traits::kTileN, first_key, key_head, batch,
                                            full);
}

// Copies the tiles of mean keys of a row.
template <typename Traits>
__device__ void produce_mean_keys(const KernelParams& params, const RowItem& row, int key_head,
                                  RingPosition<Traits::kKeySlots>& keys,
                                  typename Traits::SharedStorage& shared) {
  RowMeans<Traits::kTileN> means(params.attend.visibility, params.stood_in_for, row);
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
template <typename Traits, bool kCompensate, typename Params>
__device__ void produce_keys(const Params& params, typename Traits::SharedStorage& shared) {
  const int group = static_cast<int>(group_size(params.attend.visibility, params.attend.heads));
  const bool leader = threadIdx.x % 32 == 0;
  RingPosition<1> rows;
  RingPosition<Traits::kKeySlots> keys;
  for (;;) {
    const int item = take_item(params.next_item);
    shared.row_empty.wait(rows.parity ^ 1);  // until all have read the last row
    rows.advance();
    if (item >= num_items_of(params)) {
      if (leader) {
        shared.row.index = -1;
        shared.row_full.arrive();
      }
      return;
    }
    RowItem row = row_of_item(params, item);
    const int key_head = row.head / group;
    auto blocks = blocks_of<kCompensate>(params, row);
    int n_block = blocks.next();
    row.without_tiles = n_block < 0;
    bool means_follow = false;
    if constexpr (kCompensate) {
      means_follow =
          RowMeans<Traits::kTileN>(params.attend.visibility, params.stood_in_for, row).next() >= 0;
      row.without_tiles = n_block < 0 && !means_follow;
    }
    if (leader) {
      shared.row = row;
      shared.row_full.arrive();
    }
    while (n_block >= 0) {
      const bool plain = blocks.is_plain(), bounded = blocks.may_hold_unseen_keys();
      const int next = blocks.next();
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t) {
        const TilePlacesOf<Traits, Params> places(params, row, n_block, t);
        shared.key_empty[keys.slot].wait(keys.parity ^ 1);
        if (leader) {
          const int first_key = first_key_of<Traits>(n_block, t);
          const bool last_of_keys = next < 0 && t == 0;
          shared.tile[keys.slot] = {first_key, plain, bounded, last_of_keys && !means_follow,
                                    last_of_keys};
          places.template copy<Traits::kPanels>(shared.key[keys.slot], params.key, key_head,
                                                shared.key_full[keys.slot]);
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
template <typename Traits, bool kUnseenKeys, bool kCompensate, typename Params>
__device__ void produce_values(const Params& params, typename Traits::SharedStorage& shared) {
  const int group = static_cast<int>(group_size(params.attend.visibility, params.attend.heads));
  RingPosition<Traits::kValueSlots> values;
  follow_rows(shared, [&](const RowItem& row) {
    const int key_head = row.head / group;
    auto blocks = blocks_of<kCompensate>(params, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next()) {
      Barrier* full =
          kUnseenKeys && blocks.may_hold_unseen_keys() ? shared.value_uncleared : shared.value_full;
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t) {
        const TilePlacesOf<Traits, Params> places(params, row, n_block, t);
        shared.value_empty[values.slot].wait(values.parity ^ 1);
        if (threadIdx.x % 32 == 0) {
          places.template copy<Traits::kValuePanels>(shared.value[values.slot], params.value,
                                                     key_head, full[values.slot]);
        }
        values.advance();
      }
    }
    if constexpr (kCompensate) {
      RowMeans<Traits::kTileN> means(params.attend.visibility, params.stood_in_for, row);
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
template <typename Traits, bool kCompensate, typename Params>
__device__ void clear_values(const Params& params, typename Traits::SharedStorage& shared) {
  constexpr bool kRagged = std::is_same_v<Params, RaggedKernelParams>;
  RingPosition<Traits::kValueSlots> values;
  uint32_t parities = 0;  // of value_uncleared, a bit for each slot
  follow_rows(shared, [&](const RowItem& row) {
    const Visibility& visibility = attend_of(params, row).visibility;
    const int32_t* bounds =
        !kRagged && visibility.row_bounds.data
            ? row_bounds_of(visibility.row_bounds, row.batch, visibility.bounds_head(row.head))
            : nullptr;
    const int64_t first_row = row.m_block * kBlockSize;
    const int64_t last_row = min(first_row + kBlockSize, visibility.seqlen_q) - 1;
    auto blocks = blocks_of<kCompensate>(params, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next()) {
      const bool clears = blocks.may_hold_unseen_keys();
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t, values.advance()) {
        if (!clears) continue;
        shared.value_uncleared[values.slot].wait(parities >> values.slot & 1);
        parities ^= 1u << values.slot;
        const int64_t first_key = n_block * kBlockSize + t * Traits::kTileN;
        for (int i = static_cast<int>(threadIdx.x) % 32; i < Traits::kTileN; i += 32) {
          // Past the end they are zero already, from the copy, but for a ragged batch.
          if ((!kRagged && first_key + i >= visibility.seqlen_k) ||
              seen_by_rows(visibility, bounds, first_key + i, first_row, last_row)) {
            continue;
          }
          for (int panel = 0; panel < Traits::kValuePanels; ++panel) {
            auto* chunks = reinterpret_cast<uint4*>(
                shared.value[values.slot] + (panel * Traits::kTileN + i) * Traits::kPanelColumns);
            constexpr int kChunks =
                Traits::kPanelColumns * sizeof(typename Traits::Element) / sizeof(uint4);
            for (int chunk = 0; chunk < kChunks; ++chunk) chunks[chunk] = make_uint4(0, 0, 0, 0);
          }
        }
        fence_async_proxy_shared();  // wgmma reads what these stores wrote
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.value_full[values.slot].arrive();
      }
    }
    if constexpr (kCompensate) {
      RowMeans<Traits::kTileN> means(params.attend.visibility, params.stood_in_for, row);
      while (means.next() >= 0) values.advance();  // there is nothing to clear in means
    }
  });
}

template <typename Traits, typename Params>
__device__ void produce_queries(const Params& params, typename Traits::SharedStorage& shared) {
  constexpr uint32_t kBytes = kConsumerRows * Traits::kHeadDim * sizeof(typename Traits::Element);
  const bool leader = threadIdx.x % 32 == 0;
  RingPosition<1> queries;
  follow_rows(shared, [&](const RowItem& row) {
    const auto place = [&](int consumer) {
      return query_place(params, row, row.m_block * kBlockSize + consumer * kConsumerRows);
    };
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      if (!leader) continue;
      prefetch_rows<Traits::kPanels, Traits::kPanelColumns>(params.query, place(consumer).row,
                                                            row.head, place(consumer).batch);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      // Until it is done with the last ones.
      shared.query_empty[consumer].wait(queries.parity ^ 1);
      if (!leader) continue;
      shared.query_full[consumer].arrive_and_expect(kBytes);
      copy_rows<Traits::kPanels, Traits::kPanelColumns>(
          shared.query[consumer], params.query, kConsumerRows, place(consumer).row, row.head,
          place(consumer).batch, shared.query_full[consumer]);
    }
    queries.advance();
  });
}

}  // namespace rrattn::cuda::sm90::attend
