// The producer warp of block-sparse attention: takes rows of the block mask, walks their bits and
// copies the tiles that these select.
#pragma once

#include "attend_config.cuh"
#include "bit_walk.cuh"
#include "block_masking.cuh"
#include "tensor_copy.cuh"

namespace rrattn::cuda {

// What the kernel is launched with.
struct AttendKernelParams {
  AttendParams attend;
  CUtensorMap query, key, value;
  const RunBounds* block_bounds;
  int* next_row;
  int num_rows;
  int section_heads;  // key heads whose rows are worked off together
  bool aligned_out;
};

struct RowPlace {
  int m_block, head, batch;

  __device__ RowPlace(const Visibility& visibility, int index) {
    const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
    const int num_heads = static_cast<int>(visibility.num_heads);
    m_block = index % num_m_blocks;
    head = index / num_m_blocks % num_heads;
    batch = index / num_m_blocks / num_heads;
  }
};

// The order of the work: section by section of key heads, so that their keys and values stay in the
// L2 cache; in a section, query blocks from the last, under the diagonal the longest, to the first,
// heads side by side.
__device__ inline int row_of_turn(const AttendKernelParams& params, int turn) {
  const Visibility& visibility = params.attend.visibility;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_heads = params.num_rows / num_m_blocks;  // query heads of all batch entries
  const int group = static_cast<int>(visibility.num_heads / params.attend.heads.num_heads_k);
  const int section = turn / (params.section_heads * group * num_m_blocks);
  const int first_head = section * params.section_heads * group;
  const int heads = min(params.section_heads * group, num_heads - first_head);
  turn -= first_head * num_m_blocks;
  return (first_head + turn % heads) * num_m_blocks + num_m_blocks - 1 - turn / heads;
}

template <typename Traits>
__device__ void produce_tiles(const AttendKernelParams& params,
                              typename Traits::SharedStorage& shared) {
  const Visibility& visibility = params.attend.visibility;
  const int group = static_cast<int>(visibility.num_heads / params.attend.heads.num_heads_k);
  const bool leader = threadIdx.x == 0;
  RingPosition<1> rows, queries;
  RingPosition<Traits::kStages> keys, values;

  const auto copy_tile = [&](const CUtensorMap& map, typename Traits::Element* to, int first_key,
                             const RowPlace& place, Barrier& full) {
    full.arrive_and_expect(Traits::kTileBytes);
    copy_rows<Traits::kPanels>(to, map, Traits::kTileN, first_key, place.head / group, place.batch,
                               full);
  };

  for (;;) {
    int turn = 0;
    if (leader) turn = atomicAdd(params.next_row, 1);
    turn = __shfl_sync(~0u, turn, 0);
    const int row = turn < params.num_rows ? row_of_turn(params, turn) : -1;
    shared.row_empty.wait(rows.parity ^ 1);  // until the consumers have read the last one
    rows.advance();
    if (row < 0) {
      if (leader) {
        shared.row.index = -1;
        shared.row_full.arrive();
      }
      return;
    }
    const RowPlace place(visibility, row);
    const int64_t last_token =
        min((static_cast<int64_t>(place.m_block) + 1) * kBlockSize, visibility.seqlen_q) - 1;
    const RunBounds* bounds =
        run_bounds_of(visibility, kBlockSize, params.block_bounds, place.batch, place.head);
    BitWalk walk(params.attend.block_mask + row * visibility.num_mask_words(),
                 visibility.causal
                     ? static_cast<int>((last_token + visibility.shift()) / kBlockSize) + 1
                     : static_cast<int>(visibility.num_n_blocks()));
    BlockKind kind = BlockKind::kHidden;
    const auto next_block = [&] {  // that is selected and visible; < 0: there is none left
      int n_block;
      do {
        n_block = walk.next();
        if (n_block >= 0) kind = classify_block(visibility, bounds, place.m_block, n_block);
      } while (n_block >= 0 && kind == BlockKind::kHidden);
      return n_block;
    };
    int n_block = next_block();
    if (leader) {
      shared.row = {row, n_block < 0};
      shared.row_full.arrive();
    }
    if (n_block < 0) continue;

    shared.query_empty.wait(queries.parity ^ 1);  // until the consumers are done with the last one
    queries.advance();
    if (leader) {
      shared.query_full.arrive_and_expect(kBlockSize * Traits::kHeadDim *
                                          sizeof(typename Traits::Element));
      for (int g = 0; g < kConsumerGroups; ++g) {
        copy_rows<Traits::kPanels>(shared.query[g], params.query, kGroupRows,
                                   place.m_block * kBlockSize + g * kGroupRows, place.head,
                                   place.batch, shared.query_full);
      }
    }
    while (n_block >= 0) {
      const bool plain = params.attend.softmax_scale > 0 &&
                         !has_hidden_scores(visibility, kind, place.m_block, n_block);
      const int next = next_block();
      for (int t = Traits::kTilesPerBlock - 1; t >= 0; --t) {
        const int first_key = n_block * kBlockSize + t * Traits::kTileN;
        shared.key_empty[keys.slot].wait(keys.parity ^ 1);
        if (leader) {
          shared.tile[keys.slot] = {first_key, plain, next < 0 && t == 0};
          copy_tile(params.key, shared.key[keys.slot], first_key, place,
                    shared.key_full[keys.slot]);
        }
        keys.advance();
        shared.value_empty[values.slot].wait(values.parity ^ 1);
        if (leader) {
          copy_tile(params.value, shared.value[values.slot], first_key, place,
                    shared.value_full[values.slot]);
        }
        values.advance();
      }
      n_block = next;
    }
  }
}

}  // namespace rrattn::cuda
