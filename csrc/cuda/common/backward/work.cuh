// The items of work of the gradients, and the order in which they are taken.
//
// The walk of a key tile goes over the query blocks of all heads of a group. It is cut into parts,
// of some heads or of a window of one head's query blocks, whose queries, dO and sums of dQ fit in
// the L2 cache. An item is a part of the walk of a key tile. All key tiles have their turn at a
// part before the next part begins, so that what the items in flight read stays in the cache, also
// where some keys are selected by far more queries than others and their walks would lose step. What
// the items of a key tile have for its dK and dV is added up in the workspace (key_sums.cuh).
#pragma once

#include "../heads.cuh"
#include "../launch.cuh"
#include "../work_order.cuh"

namespace rrattn::cuda::backward {

// How items are numbered: section by section, each of some key heads; in a section round by round,
// each of as many key tiles as have room for their sums in the workspace; in a round part by part;
// in a part key tile by key tile, from the first, under the diagonal those of the longest items, to
// the last; and of each the heads of the section.
struct WorkOrder {
  // A part of a walk.
  struct Part {
    int first_head, heads;    // query heads, of the key head's group
    int first_block, blocks;  // query blocks, of each head
  };

  int num_items;
  int num_heads;      // key heads of all batch entries
  int num_key_tiles;  // of a key head
  int section_heads;  // key heads of a section
  int round_tiles;    // key tiles of a round, of each head
  int part_heads;     // query heads of a part
  int part_blocks;    // query blocks of a part, of each head
  int windows;        // of part_blocks query blocks, the last perhaps of fewer
  int num_parts;      // windows times the parts by heads

  // The number of an item; Place is the other way round.
  __device__ int item_of(int head, int key_tile, int part) const {
    const int first_head = head / section_heads * section_heads;
    const int heads = min(section_heads, num_heads - first_head);
    const int first_tile = key_tile / round_tiles * round_tiles;
    const int tiles = min(round_tiles, num_key_tiles - first_tile);
    return ((first_head * num_key_tiles + first_tile * heads) * num_parts) + part * heads * tiles +
           (key_tile - first_tile) * heads + head - first_head;
  }
  // group: the query heads of a key head.
  __device__ Part part_of(int part, int group, int num_m_blocks) const {
    const int first_head = part / windows * part_heads, first_block = part % windows * part_blocks;
    return {first_head, min(part_heads, group - first_head), first_block,
            min(part_blocks, num_m_blocks - first_block)};
  }
  int num_slots() const { return section_heads * round_tiles; }  // for sums in the workspace
};

// Bytes of the queries, dO and sums of dQ of a section. At short lengths a section is several key
// heads, so that the thread blocks are done at about the same time. Bytes of the sums of dK and dV in
// the workspace. See docs/tuning.md.
constexpr int64_t kSectionBytes = 64 << 20, kKeySumsBytes = 64 << 20;
// The time of an item besides that of its query blocks, in visible ones of which half are selected:
// some microseconds to fetch its keys, to fill and drain the pipeline and to leave its sums.
constexpr double kItemCost = 3;
constexpr int64_t kLeastPositions = kMaskWordBits;  // a window starts at a word of the mask

// Cuts the walks into parts of at most `positions` query blocks, all of about the same size.
inline void cut_walks(WorkOrder& order, int64_t positions, int64_t group, int64_t num_m_blocks) {
  const int64_t most_heads =
      std::clamp<int64_t>(positions / std::max<int64_t>(1, num_m_blocks), 1, group);
  const int64_t part_heads = ceil_div(group, ceil_div(group, most_heads));
  const int64_t windows = std::max<int64_t>(1, ceil_div(num_m_blocks, positions));
  const int64_t words =
      std::max<int64_t>(1, ceil_div(ceil_div(num_m_blocks, windows), kMaskWordBits));
  const int64_t part_blocks = words * kMaskWordBits;
  order.part_heads = static_cast<int>(part_heads);
  order.part_blocks = static_cast<int>(part_blocks);
  order.windows = static_cast<int>(std::max<int64_t>(1, ceil_div(num_m_blocks, part_blocks)));
  order.num_parts = static_cast<int>(ceil_div(group, part_heads)) * order.windows;
  order.num_items = order.num_heads * order.num_key_tiles * order.num_parts;
}

// The time that all items take, in visible query blocks of a key tile, tiles_of_block of which are a
// key block. In the end thread blocks wait for the last of them, in simulations for about a quarter of
// the longest item, or of the longest late one.
inline double time_of(const WorkOrder& order, int late_tiles, int64_t tiles_of_block,
                      const Visibility& visibility, int64_t group, int multiprocessors) {
  const int64_t num_m_blocks = visibility.num_m_blocks();
  int64_t blocks = num_m_blocks * visibility.num_n_blocks();  // of a head, visible
  if (visibility.causal) blocks -= num_m_blocks * (num_m_blocks - 1) / 2;
  const auto all = static_cast<double>(order.num_heads * group * blocks * tiles_of_block);
  const auto longest =
      static_cast<double>(order.part_heads * std::min<int64_t>(order.part_blocks, num_m_blocks));
  const auto last =
      late_tiles == 0
          ? longest
          : static_cast<double>(
                group * (visibility.causal ? ceil_div(late_tiles, tiles_of_block) : num_m_blocks));
  return std::max({longest, last, all / multiprocessors + last / 4}) +
         kItemCost * (order.num_items + order.num_heads * late_tiles) / multiprocessors;
}

// Bytes of the queries, dO and sums of dQ of a query block.
template <typename Traits>
constexpr int64_t kPositionBytes =
    kBlockSize * ((Traits::kHeadDim + Traits::kHeadDimV) *
                      static_cast<int64_t>(sizeof(typename Traits::Element)) +
                  Traits::kHeadDim * static_cast<int64_t>(sizeof(float)));

struct ChosenOrder {
  WorkOrder order;
  double time;  // as time_of says
};

// The order of the items of all key tiles but the last late_tiles of each head. part_bytes: of the
// queries, dO and sums of dQ of a part of a walk, at most.
template <typename Traits>
ChosenOrder choose_work_order(const BackwardParams& params, int64_t part_bytes,
                              int late_tiles = 0) {
  constexpr int64_t kSlotBytes =
      Traits::kKeys * (Traits::kHeadDim + Traits::kHeadDimV) * static_cast<int64_t>(sizeof(float));
  constexpr int64_t kTilesOfBlock = kBlockSize / Traits::kKeys;
  const int64_t most_positions = part_bytes / kPositionBytes<Traits>;
  const Visibility& visibility = params.visibility;
  const int64_t num_m_blocks = visibility.num_m_blocks();
  const int64_t num_heads = visibility.batch * params.heads.num_heads_k;
  const int64_t num_key_tiles = visibility.num_n_blocks() * kTilesOfBlock - late_tiles;
  if (num_heads * num_key_tiles == 0) return {};
  const int64_t group = group_size(visibility, params.heads);
  const int multiprocessors = num_multiprocessors();
  WorkOrder uncut{};
  uncut.num_heads = static_cast<int>(num_heads);
  uncut.num_key_tiles = static_cast<int>(num_key_tiles);
  uncut.section_heads =
      heads_in_section(kSectionBytes, group * num_m_blocks * kPositionBytes<Traits>, num_heads);
  uncut.round_tiles = static_cast<int>(
      std::clamp<int64_t>(kKeySumsBytes / kSlotBytes / uncut.section_heads, 1, num_key_tiles));
  const auto cut = [&](int64_t positions) {
    WorkOrder order = uncut;
    cut_walks(order, positions / kLeastPositions * kLeastPositions, group, num_m_blocks);
    return ChosenOrder{
        order, time_of(order, late_tiles, kTilesOfBlock, visibility, group, multiprocessors)};
  };
  ChosenOrder chosen = cut(most_positions);
  for (int64_t positions = most_positions / 2; positions >= kLeastPositions; positions /= 2) {
    const ChosenOrder finer = cut(positions);
    if (finer.time < chosen.time) chosen = finer;
  }
  return chosen;
}

// The place of an item of kKeys keys, a key block or a part of one.
template <int kKeys>
struct Place {
  int key_tile, key_head, batch;
  int part;  // of the walk: window by window, and so for some heads after others

  Place() = default;
  __device__ Place(const BackwardParams& params, const WorkOrder& order, int item) {
    const int first_head =
        item / (order.section_heads * order.num_key_tiles * order.num_parts) * order.section_heads;
    const int heads = min(order.section_heads, order.num_heads - first_head);
    item -= first_head * order.num_key_tiles * order.num_parts;
    const int first_tile = item / (heads * order.round_tiles * order.num_parts) * order.round_tiles;
    const int tiles = min(order.round_tiles, order.num_key_tiles - first_tile);
    item -= first_tile * heads * order.num_parts;
    part = item / (heads * tiles);
    item -= part * heads * tiles;
    const int tile = item / heads;
    const int head = first_head + item - tile * heads,
              num_heads_k = static_cast<int>(params.heads.num_heads_k);
    key_tile = first_tile + tile;
    batch = head / num_heads_k;
    key_head = head - batch * num_heads_k;
  }
  __device__ int n_block() const { return key_tile / (kBlockSize / kKeys); }
  __device__ int first_key() const { return key_tile * kKeys; }
  __device__ int window(const WorkOrder& order) const { return part % order.windows; }
  // The first window of which some query sees a key, if the diagonal alone hides some. It may be the
  // last: the last query sees the last key, and half a key block may lie behind that.
  __device__ int first_window(const Visibility& visibility, const WorkOrder& order) const {
    if (!visibility.causal) return 0;
    const int first_query = max(first_key() - static_cast<int>(visibility.shift()), 0);
    return min(first_query / (order.part_blocks * kBlockSize), order.windows - 1);
  }
};

}  // namespace rrattn::cuda::backward
