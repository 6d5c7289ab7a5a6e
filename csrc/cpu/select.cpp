// Top-tau selection on the CPU.
//
//   block_scores [B, Hq, Mq, Mk] float32  ->  block_mask [B, Hq, Mq, ceil(Mk / 32)]
//
// Bit j % 32 of word j / 32 stands for key block j. A row keeps its visible blocks from the largest
// score down (the lower index first among equals) while the mass before a block is < tau * row_sum
// and its own is >= min_share * row_sum / visible blocks, and whatever the keep rules add. Masses
// are in fixed point, score * 2^32 in int64, so that the choice does not depend on the order of
// addition.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/geometry.h"
#include "kernels.h"
#include "parallel.h"
#include "span_bounds.h"

namespace rrattn::cpu {

namespace {

struct SelectScratch {
  BlockKind* kinds;  // [Mk]
  uint64_t* keys;    // [Mk], sort keys of the visible blocks
};

int64_t scratch_bytes(int64_t num_n_blocks) {
  return num_n_blocks * static_cast<int64_t>(sizeof(uint64_t) + sizeof(BlockKind)) + 64;
}

int64_t mass_of(float score) { return std::llrint(static_cast<double>(score) * 0x1p32); }

// Ascending keys are descending scores (non-negative floats order like their bits), then ascending
// indices.
uint64_t sort_key(float score, int64_t n_block) {
  uint32_t bits;
  score += 0.0f;  // -0 becomes 0
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(n_block);
}

void set_bit(uint32_t* mask_row, int64_t n_block) {
  mask_row[n_block / kMaskWordBits] |= 1u << (n_block % kMaskWordBits);
}

// Keeps the largest scores of the visible blocks up to tau of their mass.
void keep_top(const float* scores, float tau, float min_share, int64_t num_n_blocks,
              const SelectScratch& scratch, uint32_t* mask_row) {
  int64_t row_sum = 0, num_visible = 0;
  bool keep_all = tau == 1;
  for (int64_t n = 0; n < num_n_blocks && !keep_all; ++n) {
    if (scratch.kinds[n] == BlockKind::kHidden) continue;
    keep_all = !(scores[n] >= 0 && scores[n] < kScoreEnd);
    if (keep_all) break;
    row_sum += mass_of(scores[n]);
    scratch.keys[num_visible++] = sort_key(scores[n], n);
  }
  if (keep_all) {
    for (int64_t n = 0; n < num_n_blocks; ++n) {
      if (scratch.kinds[n] != BlockKind::kHidden) set_bit(mask_row, n);
    }
    return;
  }
  std::sort(scratch.keys, scratch.keys + num_visible);
  const double target = static_cast<double>(tau) * static_cast<double>(row_sum);
  const double least = least_mass(min_share, row_sum, num_visible);
  int64_t mass_before = 0;
  for (int64_t i = 0; i < num_visible && static_cast<double>(mass_before) < target; ++i) {
    const int64_t n_block = static_cast<uint32_t>(scratch.keys[i]);
    const int64_t mass = mass_of(scores[n_block]);
    if (static_cast<double>(mass) < least) break;
    set_bit(mask_row, n_block);
    mass_before += mass;
  }
}

// Adds the blocks that are kept whatever they score. Hidden blocks never are.
void keep_by_rule(const SelectParams& params, int64_t m_block, const SelectScratch& scratch,
                  uint32_t* mask_row) {
  const Visibility& visibility = params.visibility;
  const MaskRow row = mask_row_of(visibility, m_block);
  const BlockKind* begin = scratch.kinds;
  const BlockKind* end = begin + visibility.num_n_blocks();
  const auto is_visible = [](BlockKind kind) { return kind != BlockKind::kHidden; };
  const auto first_visible = static_cast<int>(std::find_if(begin, end, is_visible) - begin);
  for (int word = 0; word < visibility.num_mask_words(); ++word) {
    const BlockKind* kinds = begin + word * kMaskWordBits;
    uint32_t visible = 0, partial = 0;
    for (int i = 0; i < kMaskWordBits && kinds + i < end; ++i) {
      visible |= static_cast<uint32_t>(is_visible(kinds[i])) << i;
      partial |= static_cast<uint32_t>(kinds[i] == BlockKind::kPartial) << i;
    }
    mask_row[word] |= (kept_by_rule(params.rules, row, first_visible, word) | partial) & visible;
  }
}

}  // namespace

namespace {

// Of the call with the most.
int64_t most_n_blocks(const Calls<SelectParams>& calls) {
  int64_t most = 0;
  for (int64_t c = 0; c < calls.count; ++c)
    most = std::max(most, calls[c].visibility.num_n_blocks());
  return most;
}

// A row of the mask of any head and batch entry.
void select_row(const SelectParams& params, const SpanBounds* block_bounds, int64_t row,
                const SelectScratch& scratch) {
  const Visibility& visibility = params.visibility;
  const int64_t num_n_blocks = visibility.num_n_blocks(), num_m_blocks = visibility.num_m_blocks();
  const int64_t num_words = visibility.num_mask_words();
  const int64_t m_block = row % num_m_blocks, head = row / num_m_blocks % visibility.num_heads;
  const int64_t batch = row / num_m_blocks / visibility.num_heads;
  const SpanBounds* bounds = span_bounds_of(visibility, kBlockSize, block_bounds, batch, head);
  for (int64_t n = 0; n < num_n_blocks; ++n)
    scratch.kinds[n] = classify_block(visibility, bounds, m_block, n);
  uint32_t* mask_row = params.block_mask + row * num_words;
  std::fill(mask_row, mask_row + num_words, 0u);
  keep_top(params.block_scores + row * num_n_blocks, params.rules.threshold_of(head),
           params.rules.min_share, num_n_blocks, scratch, mask_row);
  keep_by_rule(params, m_block, scratch, mask_row);
}

}  // namespace

int64_t select_workspace_bytes(const Calls<SelectParams>& calls) {
  int64_t num_bounds = 0;
  for (int64_t c = 0; c < calls.count; ++c)
    num_bounds += calls[c].visibility.num_span_bounds(kBlockSize);
  return num_bounds * static_cast<int64_t>(sizeof(SpanBounds)) +
         calls[0].execution.num_threads * scratch_bytes(most_n_blocks(calls));
}

void run_select(const Calls<SelectParams>& calls) {
  const Execution& execution = calls[0].execution;
  const int64_t num_n_blocks = most_n_blocks(calls);
  auto* const all_bounds = static_cast<SpanBounds*>(execution.workspace);
  SpanBounds* end_bounds = all_bounds;
  for (int64_t c = 0; c < calls.count; ++c) {
    compute_span_bounds(calls[c].visibility, kBlockSize, execution.num_threads, end_bounds);
    end_bounds += calls[c].visibility.num_span_bounds(kBlockSize);
  }
  char* all_scratch = reinterpret_cast<char*>(end_bounds);
  const auto select_rows = [&](int thread, int64_t c, int64_t begin, int64_t end) {
    char* own = all_scratch + thread * scratch_bytes(num_n_blocks);
    auto* keys = reinterpret_cast<uint64_t*>(own);
    const SelectScratch scratch{reinterpret_cast<BlockKind*>(keys + num_n_blocks), keys};
    const SpanBounds* block_bounds = all_bounds;
    for (int64_t before = 0; before < c; ++before)
      block_bounds += calls[before].visibility.num_span_bounds(kBlockSize);
    for (int64_t row = begin; row < end; ++row) select_row(calls[c], block_bounds, row, scratch);
  };
  constexpr int64_t kWorkPerBlock = 512;  // classify and sort, as multiply-adds of the kernels
  parallel_for_calls(
      execution.num_threads, calls.count,
      [&](int64_t c) { return calls[c].visibility.num_mask_rows(); },
      grain_for(num_n_blocks * kWorkPerBlock), select_rows);
}

int64_t select_workspace_bytes(const SelectParams& params) {
  return select_workspace_bytes(Calls<SelectParams>{&params, 1});
}

void run_select(const SelectParams& params) { run_select(Calls<SelectParams>{&params, 1}); }

}  // namespace rrattn::cpu
