// Top-tau selection on the GPU.
//
//   block_scores [B, Hq, Mq, Mk] float32  ->  block_mask [B, Hq, Mq, ceil(Mk / 32)]
//
// Same rules and same bits as csrc/cpu/select.cpp. A thread block of 1 to 8 warps takes a row and
// holds its scores in registers. Instead of sorting, it looks for the cut (cut.cuh). All scores
// above it are kept. Of those equal to it, as many are kept, from the lowest index on, as fit the
// same inequality. Masses are integers, so they may be added in any order.
#pragma once

#include "../common/ragged_plan.cuh"
#include "../common/span_bounds.cuh"
#include "cut.cuh"

namespace rrattn::cuda::select {

constexpr uint32_t kNothing = 0x7fffffff;  // above the bits of every score

struct KernelParams {
  SelectParams select;
  const SpanBounds* block_bounds;
};

// Which row a thread block has, and what it may see.
struct Row {
  int index;  // in [B, Hq, Mq]
  int m_block, head;
  MaskRow of_mask;
  int end_block;  // of those that may be visible

  __device__ Row(const Visibility& visibility, int index) : index(index) {
    const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
    const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
    m_block = index % num_m_blocks;
    head = index / num_m_blocks % static_cast<int>(visibility.num_heads);
    of_mask = mask_row_of(visibility, m_block);
    end_block = of_mask.causal ? of_mask.end_own : num_n_blocks;
  }
};

// This lane's scores, one of each word. All loads are on their way before the first is used. Hidden
// blocks score 0: with no mass, they are never at the cut, and rows without any mass keep nothing.
template <int kWarps, int kWords>
__device__ inline void load_scores(const float* scores, int end_block, float (&loaded)[kWords]) {
  const int end_offset = end_block - static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int offset = kWarps * 32 * i;
    loaded[i] = offset < end_offset ? scores[threadIdx.x + offset] : 0;
  }
}

// Under FlashMask: makes the scores of hidden blocks 0, and gives lane i the bits of the visible
// and of the partial blocks of word i of its warp.
template <int kWarps, int kWords>
__device__ inline void classify_blocks(const KernelParams& params, const Row& row,
                                       const WarpWords<kWarps, kWords>& words,
                                       float (&loaded)[kWords], uint32_t& visible_bits,
                                       uint32_t& partial_bits) {
  const Visibility& visibility = params.select.visibility;
  const SpanBounds* bounds = span_bounds_of(
      visibility, kBlockSize, params.block_bounds,
      row.index / static_cast<int>(visibility.num_m_blocks()) / visibility.num_heads, row.head);
  words.each([&](int i) {
    const int n_block = words.number(i) * 32 + words.lane();
    const BlockKind kind = n_block < row.end_block
                               ? classify_block(visibility, bounds, row.m_block, n_block)
                               : BlockKind::kHidden;
    if (kind == BlockKind::kHidden) loaded[i] = 0;
    const uint32_t visible = __ballot_sync(~0u, kind != BlockKind::kHidden);
    const uint32_t partial = __ballot_sync(~0u, kind == BlockKind::kPartial);
    if (words.lane() == i) visible_bits = visible, partial_bits = partial;
  });
}

// Half of the warps of a multiprocessor at once, which leave each thread 64 registers, in no more
// thread blocks than any GPU holds: ptxas ignores a bound of more.
constexpr int blocks_at_once(int num_warps) { return num_warps > 1 ? 32 / num_warps : 16; }

template <int kWarps, int kWords, bool kFlashMask>
__device__ __forceinline__ void select_row(const KernelParams& params, const Row& row) {
  using Search = CutSearch<kWarps, kWords>;
  alignas(16) __shared__ typename RowReduction<kWarps>::Shared of_warps;
  __shared__ typename Search::Shared of_search;
  const SelectParams& select = params.select;
  const Visibility& visibility = select.visibility;
  const float tau = select.rules.threshold_of(row.head);
  const WarpWords<kWarps, kWords> words(row.end_block);
  RowReduction<kWarps> reduction(of_warps);

  float loaded[kWords];
  load_scores<kWarps>(
      select.block_scores + static_cast<int64_t>(row.index) * visibility.num_n_blocks(),
      row.end_block, loaded);
  uint32_t visible_bits = 0, partial_bits = 0;
  if constexpr (kFlashMask) {
    classify_blocks(params, row, words, loaded, visible_bits, partial_bits);
  }

  uint32_t score_bits[kWords];  // of scores times 2^32, which are masses but for the rounding
  long long mass = 0;
  uint32_t highest = 0, lowest = 0;  // the lowest that is not 0, negated
  words.each([&](int i) {
    score_bits[i] = __float_as_uint(fmaf(loaded[i], 0x1p32f, 0));  // -0 becomes 0
    mass += mass_of(score_bits[i]);
    highest = max(highest, score_bits[i]);
    lowest = max(lowest, 0u - score_bits[i]);
  });
  highest = reduction.max(highest);
  // The bits of negative scores and of NaN are greater as well.
  const bool keep_all = !(tau > 0 && tau < 1) || highest >= __float_as_uint(kScoreEnd * 0x1p32f);

  int num_visible = row.end_block;
  if constexpr (kFlashMask) {
    num_visible = static_cast<int>(reduction.sum(static_cast<uint32_t>(__popc(visible_bits))));
  }
  Cut cut{keep_all ? 0 : kNothing, 0, 0};
  const long long row_sum = keep_all ? 0 : reduction.sum(mass);
  if (row_sum > 0) {
    Search search(of_search, words, score_bits, reduction, tau, row_sum);
    cut = search.find(0u - reduction.max(lowest), highest);
    search.drop_ties(cut, score_bits);
    const double least = least_mass(select.rules.min_share, row_sum, num_visible);
    cut.bits = max(cut.bits, bits_of_mass(static_cast<long long>(ceil(least))));
  }
  uint32_t kept_bits = 0;
  words.each([&](int i) {
    const uint32_t kept = __ballot_sync(~0u, score_bits[i] >= cut.bits);
    if (words.lane() == i) kept_bits = kept;
  });

  // From here on a lane has a whole word.
  const int word = words.number(words.lane());
  uint32_t first_visible = 0;
  if constexpr (!kFlashMask) {
    visible_bits = bits_before(row.end_block, word);
  } else {
    const uint32_t first = visible_bits ? word * 32 + __ffs(visible_bits) - 1 : ~0u;
    first_visible = ~reduction.max(~first);
  }
  const int num_words = static_cast<int>(visibility.num_mask_words());
  if (words.lane() >= kWords || word >= num_words) return;
  kept_bits |= kept_by_rule(select.rules, row.of_mask, static_cast<int>(first_visible), word);
  select.block_mask[static_cast<int64_t>(row.index) * num_words + word] =
      (kept_bits | partial_bits) & visible_bits;
}

template <int kWarps, int kWords, bool kFlashMask>
__global__ void __launch_bounds__(kWarps * 32, blocks_at_once(kWarps))
    select_kernel(KernelParams params) {
  select_row<kWarps, kWords, kFlashMask>(
      params, Row(params.select.visibility, static_cast<int>(blockIdx.x)));
}

// The same for the requests of a ragged batch. There are thread blocks for the most rows that it may
// have.
template <int kWarps, int kWords>
__global__ void __launch_bounds__(kWarps * 32, blocks_at_once(kWarps))
    ragged_select_kernel(RaggedPlan plan, int num_heads) {
  const int block = static_cast<int>(blockIdx.x) / num_heads;
  if (block >= plan.num_row_blocks()) return;
  const RequestPart part = plan.row_blocks[block];
  const KernelParams params{plan.select[part.request], nullptr};
  const Visibility& visibility = params.select.visibility;
  const int head = static_cast<int>(blockIdx.x) % num_heads;
  select_row<kWarps, kWords, false>(
      params, Row(visibility, head * static_cast<int>(visibility.num_m_blocks()) + part.index));
}

}  // namespace rrattn::cuda::select
