// What a thread block goes through: an item of work, and the query blocks that selected its keys.
#pragma once

#include "../../common/block_masking.cuh"
#include "../../common/heads.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm80::backward {

// The place of a thread block's item. Section by section come the first 5 / 8 of the key blocks, under the
// diagonal the longest items, and then the others of all heads: so no long item is left for the end, when
// thread blocks would wait for it.
template <typename Traits>
__device__ inline typename Traits::Place item_place(const KernelParams& params) {
  using Place = typename Traits::Place;
  const int num_heads_k = static_cast<int>(params.backward.heads.num_heads_k);
  const int num_tiles =
      static_cast<int>(params.backward.visibility.num_n_blocks()) * (kBlockSize / Traits::kKeys);
  const int num_heads = params.num_items / num_tiles;
  const int long_tiles = num_tiles * 5 / 8, num_long = num_heads * long_tiles;
  const int item = static_cast<int>(blockIdx.x);
  const bool is_long = item < num_long;
  WorkPlace work = place_of_item(is_long ? item : item - num_long, num_heads,
                                 is_long ? long_tiles : num_tiles - long_tiles,
                                 is_long ? params.section_heads : num_heads);
  if (!is_long) work.block += long_tiles;
  Place place;
  place.key_tile = work.block, place.part = 0;
  place.key_head = work.head % num_heads_k, place.batch = work.head / num_heads_k;
  return place;
}

__device__ inline void prefetch(const uint32_t* word) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(word));
}

// Begins the plan of an item.
template <typename Plan, typename Place>
__device__ inline void begin_plan(Plan& plan, const KernelParams& params, const Place& place) {
  const Visibility& visibility = params.backward.visibility;
  const int group = static_cast<int>(group_size(visibility, params.backward.heads));
  plan.planned = 0;
  plan.head = place.key_head * group;
  plan.end_head = plan.head + group;
  // The diagonal passes no query block before this one.
  const int64_t first_row =
      visibility.causal ? int64_t{place.n_block()} * kBlockSize - visibility.shift() : 0;
  plan.begin = max(0, static_cast<int>(first_row / kBlockSize)) / Plan::kAtOnce * Plan::kAtOnce;
  plan.end = static_cast<int>(visibility.num_m_blocks());
  plan.mask_row = params.workspace.transposed_mask +
                  ((place.batch * visibility.num_heads + plan.head) * visibility.num_n_blocks() +
                   place.n_block()) *
                      ceil_div(visibility.num_m_blocks(), kMaskWordBits);
  plan.mask_word = 0;  // read with the first block
}

// Plans blocks until kAhead follow the first `used`, or all are planned: head by head, those of a head from
// the last to the first. All lanes of a warp call it together, and each looks at one of kAtOnce blocks.
template <typename Plan, typename Place>
__device__ inline void plan_blocks(Plan& plan, const KernelParams& params, const Place& place,
                                   int used) {
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks()), n_block = place.n_block();
  int planned = plan.planned, head = plan.head, end = plan.end;
  const int end_head = plan.end_head, begin = plan.begin;
  if (planned - used >= Plan::kAhead || head == end_head) return;
  const int row_words = (num_m_blocks + kMaskWordBits - 1) / kMaskWordBits;
  const uint32_t* mask_row = plan.mask_row;
  uint32_t mask_word = plan.mask_word;
  do {
    const int first = (end - 1) / Plan::kAtOnce * Plan::kAtOnce;
    const int m_block = first + Plan::kAtOnce - 1 - lane;
    if (end % kMaskWordBits == 0 || end == num_m_blocks) {
      const int word = first / kMaskWordBits;
      mask_word = mask_row[word];
      // The word that comes next: by then it is there.
      const bool of_next_head = word == begin / kMaskWordBits;
      if (!of_next_head || head + 1 < end_head) {
        prefetch(mask_row +
                 (of_next_head ? visibility.num_n_blocks() * row_words + row_words - 1 : word - 1));
      }
    }
    BlockKind kind = BlockKind::kHidden;
    if (lane < Plan::kAtOnce && m_block < end && mask_word >> m_block % kMaskWordBits & 1) {
      kind = classify_block(
          visibility,
          span_bounds_of(visibility, kBlockSize, params.workspace.block_bounds, place.batch, head),
          m_block, n_block);
    }
    const uint32_t selected = __ballot_sync(~0u, kind != BlockKind::kHidden);
    if (kind != BlockKind::kHidden) {
      const auto first_row = [&](const Rows& rows) {
        return static_cast<const uint16_t*>(rows.data) + place.batch * rows.batch_stride +
               head * rows.head_stride + int64_t{m_block} * kBlockSize * rows.row_stride;
      };
      plan.blocks[(planned + __popc(selected & ((1u << lane) - 1))) % Plan::kSlots] = {
          first_row(backward.query), first_row(backward.grad_out), m_block * kBlockSize, head,
          has_hidden_scores(visibility, kind, m_block, n_block)};
    }
    planned += __popc(selected);
    end = first;
    if (end <= begin) {
      end = num_m_blocks;
      ++head;
      mask_row += visibility.num_n_blocks() * row_words;
    }
  } while (planned - used < Plan::kAhead && head != end_head);
  if (lane == 0) {
    if (head == end_head) plan.blocks[planned % Plan::kSlots].first_query = -1;
    plan.planned = planned, plan.head = head, plan.end = end;
    plan.mask_row = mask_row, plan.mask_word = mask_word;
  }
  __syncwarp();
}

}  // namespace rrattn::cuda::sm80::backward
