// The producer warps of attention in eight bits, as those of ../attend/producer.cuh: the first takes
// rows of the block mask and copies the keys that their bits select, the others follow it and copy
// the values and the queries.
#pragma once

#include "../../common/heads.cuh"
#include "../../common/row_blocks.cuh"
#include "../../common/work_order.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

// What the kernel is launched with.
template <int kHeadDim>
struct KernelParams {
  AttendParams attend;
  Workspace<kHeadDim> workspace;
  int num_items;
  int section_heads;  // query heads of a section
  const int* places;  // RowOrder's
  bool aligned_out;
};

// Copies bytes that lie side by side, a multiple of 16, which the barrier counts.
__device__ inline void copy_bytes(void* to, const void* from, uint32_t bytes, Barrier& full) {
  full.arrive_and_expect(bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(bytes),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(full.raw())))
      : "memory");
}

// The first tile of keys, or of values, of a row's key head.
template <typename Tile>
__device__ const Tile* head_tiles(const Tile* tiles, const AttendParams& attend,
                                  const RowItem& row) {
  const int group = static_cast<int>(group_size(attend.visibility, attend.heads));
  const int64_t head = row.batch * attend.heads.num_heads_k + row.head / group;
  return tiles + head * attend.visibility.num_n_blocks();
}

// Calls `produce(row)` for every row that the first producer takes, unless it has no tiles.
template <typename Traits, typename Produce>
__device__ void follow_rows(typename Traits::SharedStorage& shared, const Produce& produce) {
  for (RingPosition<Traits::kRowSlots> rows;; rows.advance()) {
    shared.row_full[rows.slot].wait(rows.parity);
    const RowItem row = shared.row[rows.slot];
    shared.row_empty[rows.slot].arrive();
    if (row.index < 0) return;
    if (!row.without_tiles) produce(row);
  }
}

// Takes rows, and copies their keys.
template <typename Traits>
__device__ void produce_keys(const KernelParams<Traits::kHeadDim>& params,
                             typename Traits::SharedStorage& shared) {
  const bool leader = threadIdx.x % 32 == 0;
  RingPosition<Traits::kRowSlots> rows;
  RingPosition<Traits::kKeySlots> keys;
  for (;; rows.advance()) {
    const int item = take_item(params.workspace.next_item);
    shared.row_empty[rows.slot].wait(rows.parity ^ 1);  // until all are done with the row in it
    if (item >= params.num_items) {
      if (leader) {
        shared.row[rows.slot].index = -1;
        shared.row_full[rows.slot].arrive();
      }
      return;
    }
    RowItem row = row_of_item(params, item);
    const auto* tiles = head_tiles(params.workspace.key_tiles, params.attend, row);
    RowBlocks<false> blocks(params.attend, params.workspace.block_bounds, row);
    int n_block = blocks.next();
    row.without_tiles = n_block < 0;
    if (leader) {
      shared.row[rows.slot] = row;
      shared.row_full[rows.slot].arrive();
    }
    while (n_block >= 0) {
      const bool plain = blocks.is_plain(), bounded = blocks.may_hold_unseen_keys();
      const int next = blocks.next();
      shared.key_empty[keys.slot].wait(keys.parity ^ 1);
      if (leader) {
        shared.note[keys.slot] = {n_block * kBlockSize, plain, bounded, next < 0};
        copy_bytes(&shared.key[keys.slot], tiles + n_block, KeyTile<Traits::kHeadDim>::kBytes,
                   shared.key_full[keys.slot]);
      }
      keys.advance();
      n_block = next;
    }
  }
}

// kUnseenKeys: values of blocks that may hold such keys go to `clear_values` first.
template <typename Traits, bool kUnseenKeys>
__device__ void produce_values(const KernelParams<Traits::kHeadDim>& params,
                               typename Traits::SharedStorage& shared) {
  RingPosition<Traits::kValueSlots> values;
  follow_rows<Traits>(shared, [&](const RowItem& row) {
    const auto* tiles = head_tiles(params.workspace.value_tiles, params.attend, row);
    RowBlocks<false> blocks(params.attend, params.workspace.block_bounds, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next()) {
      const bool uncleared = kUnseenKeys && blocks.may_hold_unseen_keys();
      Barrier& full = (uncleared ? shared.value_uncleared : shared.value_full)[values.slot];
      shared.value_empty[values.slot].wait(values.parity ^ 1);
      if (threadIdx.x % 32 == 0) {
        copy_bytes(&shared.value[values.slot].tile, tiles + n_block,
                   sizeof(ValueTile<Traits::kHeadDim>), full);
      } else if (kUnseenKeys && !uncleared) {
        full.arrive();  // as each lane that clears values does
      }
      values.advance();
    }
  });
}

// Zeroes values whose keys no row of the query block sees: a NaN there, even times a probability of
// 0, would make all rows NaN. A lane has 16 positions of some of the columns.
template <typename Traits>
__device__ void clear_values(const KernelParams<Traits::kHeadDim>& params,
                             typename Traits::SharedStorage& shared) {
  const Visibility& visibility = params.attend.visibility;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_position = lane % 8 * 16;
  RingPosition<Traits::kValueSlots> values;
  uint32_t parities = 0;  // of value_uncleared, a bit for each slot
  follow_rows<Traits>(shared, [&](const RowItem& row) {
    const int32_t* bounds =
        visibility.row_bounds.data
            ? row_bounds_of(visibility.row_bounds, row.batch, visibility.bounds_head(row.head))
            : nullptr;
    const int64_t first_row = row.m_block * kBlockSize;
    const int64_t last_row = min(first_row + kBlockSize, visibility.seqlen_q) - 1;
    RowBlocks<false> blocks(params.attend, params.workspace.block_bounds, row);
    for (int n_block = blocks.next(); n_block >= 0; n_block = blocks.next(), values.advance()) {
      if (!blocks.may_hold_unseen_keys()) continue;
      shared.value_uncleared[values.slot].wait(parities >> values.slot & 1);
      parities ^= 1u << values.slot;
      uint32_t kept[4] = {};  // bytes of ones for positions whose keys are seen
#pragma unroll
      for (int word = 0; word < 4; ++word) {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int64_t key = n_block * kBlockSize + key_of_position(first_position + word * 4 + i);
          // Past the end of the keys there are zeros already.
          if (key >= visibility.seqlen_k ||
              seen_by_rows(visibility, bounds, key, first_row, last_row)) {
            kept[word] |= 0xffu << i * 8;
          }
        }
      }
      uint8_t* columns = shared.value[values.slot].tile.numbers;
#pragma unroll 1
      for (int column = lane / 8; column < Traits::kHeadDim; column += 4) {
        auto* chunk = reinterpret_cast<uint4*>(
            columns + typename Traits::ValueOffsets{}(column, first_position));
        uint4 bytes = *chunk;
        bytes.x &= kept[0];
        bytes.y &= kept[1];
        bytes.z &= kept[2];
        bytes.w &= kept[3];
        *chunk = bytes;
      }
      fence_async_proxy_shared();  // wgmma reads what these stores wrote
      shared.value_full[values.slot].arrive();
    }
  });
}

template <typename Traits>
__device__ void produce_queries(const KernelParams<Traits::kHeadDim>& params,
                                typename Traits::SharedStorage& shared) {
  RingPosition<Traits::kQuerySlots> queries;
  follow_rows<Traits>(shared, [&](const RowItem& row) {
    // Until both consumers are done with the row before the last.
    shared.query_empty[queries.slot].wait(queries.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
      copy_bytes(&shared.query[queries.slot], params.workspace.query_tiles + row.index,
                 sizeof(QueryTile<Traits::kHeadDim>), shared.query_full[queries.slot]);
    }
    queries.advance();
  });
}

}  // namespace rrattn::cuda::sm90::quantized_attend
