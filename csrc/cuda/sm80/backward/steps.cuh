// What a thread block goes through: an item of work, and the query blocks that selected its keys.
#pragma once

#include "../../common/block_masking.cuh"
#include "../../common/heads.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm80::backward {

constexpr int kWholeWalk = -1;  // as the part of a place: the item's walk is not cut

// The place of an item.
template <typename Traits>
__device__ inline typename Traits::Place place_of(const KernelParams& params, int item) {
  const WorkOrder& order = params.order;
  if (item < order.num_items) return {params.backward, order, item};
  // The late key tiles, one after the other, and of each the heads.
  const int late = item - order.num_items;
  const int tile = late / order.num_heads, head = late - tile * order.num_heads;
  const int num_heads_k = static_cast<int>(params.backward.heads.num_heads_k);
  typename Traits::Place place;
  place.key_tile = order.num_key_tiles + tile, place.part = kWholeWalk;
  place.batch = head / num_heads_k, place.key_head = head - place.batch * num_heads_k;
  return place;
}

// Takes the next item some of whose queries see its keys; false: none is left. All lanes of a warp
// call it together.
template <typename Traits>
__device__ inline bool take_place(const KernelParams& params, typename Traits::Place& place) {
  for (;;) {
    const int item = take_item(params.workspace.next_item);
    if (item >= params.num_items()) return false;
    place = place_of<Traits>(params, item);
    if (place.part == kWholeWalk ||
        place.window(params.order) >=
            place.first_window(params.backward.visibility, params.order)) {
      return true;
    }
  }
}

__device__ inline void prefetch(const uint32_t* word) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(word));
}

// Begins the plan of an item.
template <typename Plan, typename Place>
__device__ inline void begin_plan(Plan& plan, const KernelParams& params, const Place& place) {
  const Visibility& visibility = params.backward.visibility;
  const int group =
      static_cast<int>(visibility.num_heads) / static_cast<int>(params.backward.heads.num_heads_k);
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const WorkOrder::Part part = place.part == kWholeWalk
                                   ? WorkOrder::Part{0, group, 0, num_m_blocks}
                                   : params.order.part_of(place.part, group, num_m_blocks);
  plan.planned = 0;
  plan.head = place.key_head * group + part.first_head;
  plan.end_head = plan.head + part.heads;
  // The diagonal passes no query block before this one.
  const int first_seeing =
      visibility.causal
          ? max(0, place.n_block() * kBlockSize - static_cast<int>(visibility.shift())) / kBlockSize
          : 0;
  plan.begin = max(first_seeing / Plan::kAtOnce * Plan::kAtOnce, part.first_block);
  plan.end_of_head = part.first_block + part.blocks;
  plan.end = plan.end_of_head;
  plan.mask_row = params.workspace.transposed_mask +
                  ((place.batch * visibility.num_heads + plan.head) * visibility.num_n_blocks() +
                   place.n_block()) *
                      ceil_div(num_m_blocks, kMaskWordBits);
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
  const int end_head = plan.end_head, begin = plan.begin, end_of_head = plan.end_of_head;
  if (planned - used >= Plan::kAhead || head == end_head) return;
  const int row_words = (num_m_blocks + kMaskWordBits - 1) / kMaskWordBits;
  const uint32_t* mask_row = plan.mask_row;
  uint32_t mask_word = plan.mask_word;
  do {
    const int first = (end - 1) / Plan::kAtOnce * Plan::kAtOnce;
    const int m_block = first + Plan::kAtOnce - 1 - lane;
    if (end % kMaskWordBits == 0 || end == end_of_head) {
      const int word = first / kMaskWordBits;
      mask_word = mask_row[word];
      // The word that comes next: by then it is there.
      const bool of_next_head = word == begin / kMaskWordBits;
      if (!of_next_head || head + 1 < end_head) {
        prefetch(mask_row + (of_next_head ? visibility.num_n_blocks() * row_words +
                                                (end_of_head - 1) / kMaskWordBits
                                          : word - 1));
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
      end = end_of_head;
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
