#include <cub/device/device_select.cuh>

#include "merge_parts.cuh"

namespace rrattn::cuda::sm90::backward {

namespace {

constexpr int kMergeThreads = 256;

// How many blocks are selected at least of an item, and of what follows it; part_blocks: all blocks of a
// part, which is short where all thread blocks would not have work otherwise. See docs/tuning.md.
__device__ inline int least_blocks(const Visibility& visibility, int part_blocks) {
  return visibility.row_bounds.data == nullptr ? min(8, part_blocks / 16)
                                               : min(64, part_blocks / 4);
}

// For each item of a key tile, the parts before its own that it includes; < 0: a later one includes
// its own. A warp takes a key tile. Blocks that the diagonal or FlashMask hides are counted as well if
// the mask has them.
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts_kernel(const __grid_constant__ BackwardParams params,
                       const uint32_t* transposed_mask, const __grid_constant__ WorkOrder order,
                       int tiles_of_block, MergedItem* all) {
  const int column = static_cast<int>(blockIdx.x * kMergeThreads + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (column >= order.num_heads * order.num_key_tiles) return;
  const int head = column / order.num_key_tiles, tile = column % order.num_key_tiles;
  const Visibility& visibility = params.visibility;
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int group =
      static_cast<int>(visibility.num_heads) / static_cast<int>(params.heads.num_heads_k);
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int row_words = ceil_div(num_m_blocks, kMaskWordBits);
  const auto selected_in = [&](int part) {
    const WorkOrder::Part of = order.part_of(part, group, num_m_blocks);
    const int first_word = of.first_block / kMaskWordBits;
    const int words = ceil_div(of.blocks, kMaskWordBits);
    int selected = 0;
    for (int at = lane; at < of.heads * words; at += 32) {
      const int64_t row =
          static_cast<int64_t>(head * group + of.first_head + at / words) * num_n_blocks +
          tile / tiles_of_block;
      selected += __popc(transposed_mask[row * row_words + first_word + at % words]);
    }
    return __reduce_add_sync(~0u, selected);
  };
  const int least =
      least_blocks(visibility, order.part_heads * min(order.part_blocks, num_m_blocks));
  int first_part = 0, taken = 0;  // of the next item
  for (int first = 0; first < order.num_parts; first += 32) {
    const int parts = min(32, order.num_parts - first);
    int of_lane = 0, left = 0;
    for (int i = 0; i < parts; ++i) {
      const int selected = selected_in(first + i);
      if (lane == i) of_lane = selected;
      left += selected;
    }
    int before = -1;
    for (int i = 0; i < parts; ++i) {
      const int selected = __shfl_sync(~0u, of_lane, i);
      taken += selected, left -= selected;
      if (first + i == order.num_parts - 1 || (taken >= least && left >= least)) {
        if (lane == i) before = first + i - first_part;
        first_part = first + i + 1, taken = 0;
      }
    }
    if (lane < parts) {
      const int number = order.item_of(head, tile, first + lane);
      all[number] = {number, before};
    }
  }
}

struct IsLeft {
  __device__ bool operator()(const MergedItem& item) const { return item.parts_before >= 0; }
};

// Lists the items that are left. Without memory it does nothing; either way it returns the bytes of memory
// that CUB needs for it.
size_t select_items(void* memory, size_t bytes, const MergedParts& merged, int num_all,
                    cudaStream_t stream) {
  RRATTN_CUDA_CHECK(cub::DeviceSelect::If(memory, bytes, merged.all, merged.items, merged.num_items,
                                          num_all, IsLeft{}, stream));
  return bytes;
}

}  // namespace

MergedParts::MergedParts(Arena& arena, const WorkOrder& order) {
  if (order.num_parts == 1 || order.num_items == 0) return;
  all = arena.take<MergedItem>(order.num_items);
  items = arena.take<MergedItem>(order.num_items);
  num_items = arena.take<int>(1);
  memory_bytes = select_items(nullptr, 0, *this, order.num_items, nullptr);
  memory = arena.take<char>(memory_bytes);
}

void MergedParts::find(const BackwardParams& params, const uint32_t* transposed_mask,
                       const WorkOrder& order, int tiles_of_block) const {
  if (all == nullptr) return;
  const cudaStream_t stream = stream_of(params.execution);
  const auto grid =
      static_cast<unsigned>(ceil_div(order.num_heads * order.num_key_tiles * 32, kMergeThreads));
  merge_parts_kernel<<<grid, kMergeThreads, 0, stream>>>(params, transposed_mask, order,
                                                         tiles_of_block, all);
  RRATTN_CUDA_CHECK(cudaGetLastError());
  select_items(memory, memory_bytes, *this, order.num_items, stream);
}

}  // namespace rrattn::cuda::sm90::backward
