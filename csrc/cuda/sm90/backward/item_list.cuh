// The items of the gradients on Hopper. By itself a part of the walk of a key tile
// (common/backward/work.cuh) is an item. But where few query blocks selected the keys, most of an
// item's time would go to its start and its end, so it takes several parts, one after the other. A
// kernel finds out which and lists the items, so that the gradients' kernel spends no time on parts
// without one.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

constexpr int kListThreads = 128;
// Selected blocks from which a part is an item by itself. Those of items of several parts are on
// average as many.
constexpr int kLeastSelected = 8;

// What a part holds for a key block, in query blocks of all its heads.
struct PartContents {
  int selected;
  int visible;  // as far as the bounds of the key block tell
};

// The query blocks from `begin` to before `end` that may see a key block of this head.
__device__ inline void clip_to_visible(const Visibility& visibility, const SpanBounds* bounds,
                                       int n_block, int& begin, int& end) {
  const int end_of_all = min(end * kBlockSize, static_cast<int>(visibility.seqlen_q));
  int first_row = begin * kBlockSize, end_row = end_of_all;
  if (visibility.causal)
    first_row = max(first_row, n_block * kBlockSize - static_cast<int>(visibility.shift()));
  if (bounds != nullptr) {
    for (const IntervalExtremes& hidden : {bounds[n_block].lower, bounds[n_block].upper}) {
      if (hidden.max_start <= first_row) first_row = max(first_row, hidden.min_end);
      if (hidden.min_end >= end_row) end_row = min(end_row, hidden.max_start);
    }
  }
  begin = min(first_row, end_of_all) / kBlockSize;
  end = max(begin, (end_row + kBlockSize - 1) / kBlockSize);
}

__device__ inline PartContents look_at_part(const BackwardParams& params,
                                            const Workspace& workspace, const WorkOrder& order,
                                            int batch, int key_head, int n_block, int part) {
  const Visibility& visibility = params.visibility;
  const int num_heads = static_cast<int>(visibility.num_heads);
  const int group = num_heads / static_cast<int>(params.heads.num_heads_k);
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int row_words = (num_m_blocks + kMaskWordBits - 1) / kMaskWordBits;
  const int first_block = part % order.windows * order.part_blocks;
  const int first_head = part / order.windows * order.part_heads;
  const int end_head = min(first_head + order.part_heads, group);
  PartContents found{};
  for (int head = key_head * group + first_head; head < key_head * group + end_head; ++head) {
    int begin = first_block, end = min(first_block + order.part_blocks, num_m_blocks);
    clip_to_visible(visibility,
                    span_bounds_of(visibility, kBlockSize, workspace.block_bounds, batch, head),
                    n_block, begin, end);
    found.visible += end - begin;
    const int64_t row =
        (static_cast<int64_t>(batch) * num_heads + head) * visibility.num_n_blocks() + n_block;
    const uint32_t* words = workspace.transposed_mask + row * row_words;
    for (int word = begin / kMaskWordBits; word * kMaskWordBits < end; ++word)
      found.selected += __popc(words[word] & bits_before(end, word) & ~bits_before(begin, word));
  }
  return found;
}

__device__ inline int sum_up_to_lane(int value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// A warp lists the items of a key tile, each lane looking at one of 32 parts. An item ends with the
// part with which the selected blocks so far pass a multiple of kLeastSelected, or with the last
// part of the 32. Under FlashMask the visible blocks so far, of those of a part, count as well: of
// a document's keys most parts hold few, which are in the L2 cache together.
template <int kKeys>
__global__ void __launch_bounds__(kListThreads)
    list_items_kernel(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ Workspace workspace,
                      const __grid_constant__ WorkOrder order,
                      const __grid_constant__ ItemLists lists) {
  const int tile_of_head = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (tile_of_head >= order.num_heads * order.num_key_tiles) return;
  const int key_tile = tile_of_head / order.num_heads;  // the longest walks first
  const int head = tile_of_head - key_tile * order.num_heads;
  const int num_heads_k = static_cast<int>(params.heads.num_heads_k);
  const int batch = head / num_heads_k, key_head = head - batch * num_heads_k;
  const int n_block = key_tile / (kBlockSize / kKeys);
  const int part_positions =
      order.part_heads * min(order.part_blocks, static_cast<int>(params.visibility.num_m_blocks()));
  const int share = max(part_positions / kLeastSelected, 1);  // of a part, for a selected block
  const int round = head / order.section_heads * order.rounds() + key_tile / order.round_tiles;
  for (int first = 0; first < order.num_parts; first += kPartsAtOnce) {
    const int part = first + lane;
    PartContents found{};
    if (part < order.num_parts)
      found = look_at_part(params, workspace, order, batch, key_head, n_block, part);
    int filled = found.selected * share;
    if (params.visibility.row_bounds.data != nullptr) filled = min(filled, found.visible);
    const int filled_so_far = sum_up_to_lane(filled);
    const int least = share * kLeastSelected;
    const bool ends = filled_so_far / least != (filled_so_far - filled) / least ||
                      lane == kPartsAtOnce - 1 || part == order.num_parts - 1;
    const uint32_t ends_of_items = __ballot_sync(~0u, ends && part < order.num_parts);
    const uint32_t filled_parts = __ballot_sync(~0u, found.selected > 0);
    if (ends_of_items >> lane & 1) {
      const uint32_t before = (1u << lane) - 1;
      const int num_done = 32 - __clz(ends_of_items & before);  // parts of items before
      const uint32_t own = (before * 2 + 1) & ~((1u << num_done) - 1);
      const int list = round * order.num_parts + part;
      const int at = atomicAdd(lists.lengths + list, 1);
      Place<kKeys> place;
      place.key_tile = key_tile, place.key_head = key_head, place.batch = batch;
      place.part = part, place.first_part = first + num_done;
      lists.items[static_cast<int64_t>(list) * lists.num_slots + at] = {
          key_tile, key_head, batch, part, filled_parts & own, turn_numbers(params, order, place)};
    }
  }
}

template <typename Traits>
void list_items(const BackwardParams& params, const Workspace& workspace, const WorkOrder& order,
                const ItemLists& lists, cudaStream_t stream) {
  if (order.num_items == 0) return;
  RRATTN_CUDA_CHECK(cudaMemsetAsync(lists.lengths, 0, lists.num_lists * sizeof(int), stream));
  const int64_t threads = int64_t{order.num_heads} * order.num_key_tiles * 32;
  list_items_kernel<Traits::kKeys>
      <<<static_cast<unsigned>(ceil_div(threads, kListThreads)), kListThreads, 0, stream>>>(
          params, workspace, order, lists);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

// Finds the items of tickets, which grow, in the lists. All lanes of a warp call it together; each
// holds where one of 32 lists ends.
class ItemFinder {
 public:
  // Whether the ticket is for an item behind these lists.
  __device__ bool is_past(int ticket) const { return __shfl_sync(~0u, end_, 31) <= ticket; }

  // Goes to the next lists; false: there are none.
  __device__ bool advance(const ItemLists& lists) {
    begin_ = __shfl_sync(~0u, end_, 31);
    first_list_ += 32;
    if (first_list_ >= lists.num_lists) return false;
    const int list = first_list_ + static_cast<int>(threadIdx.x) % 32;
    end_ = begin_ + sum_up_to_lane(list < lists.num_lists ? lists.lengths[list] : 0);
    return true;
  }

  __device__ const ListedItem& item(const ItemLists& lists, int ticket) const {
    const int which = __ffs(__ballot_sync(~0u, ticket < end_)) - 1;
    const int begin = which == 0 ? begin_ : __shfl_sync(~0u, end_, which - 1);
    return lists
        .items[static_cast<int64_t>(first_list_ + which) * lists.num_slots + ticket - begin];
  }

 private:
  int first_list_ = -32;
  int begin_ = 0;  // tickets before the first of these lists
  int end_ = 0;    // of the items before the end of the lane's list
};

}  // namespace rrattn::cuda::sm90::backward
