// Top-tau selection on the CPU.
//
//   block_scores [B, Hq, Mq, Mk] float32  ->  block_mask [B, Hq, Mq, ceil(Mk / 32)]
//
// Bit j % 32 of word j / 32 stands for key block j. A row keeps its visible blocks from the largest
// score down (the lower index first among equals) while the mass before a block is < tau * row_sum,
// and whatever the keep rules add. Masses are in fixed point, score * 2^32 in int64, so that the
// choice does not depend on the order of addition.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/geometry.h"
#include "kernels.h"
#include "parallel.h"
#include "run_bounds.h"

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
void keep_top(const float* scores, float tau, int64_t num_n_blocks, const SelectScratch& scratch,
              uint32_t* mask_row) {
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
  int64_t mass_before = 0;
  for (int64_t i = 0; i < num_visible && static_cast<double>(mass_before) < target; ++i) {
    const int64_t n_block = static_cast<uint32_t>(scratch.keys[i]);
    set_bit(mask_row, n_block);
    mass_before += mass_of(scores[n_block]);
  }
}

// Adds the blocks that are kept whatever they score. Hidden blocks never are.
void keep_by_rule(const SelectParams& params, int64_t m_block, const SelectScratch& scratch,
                  uint32_t* mask_row) {
  const Visibility& visibility = params.visibility;
  const int64_t first_row = m_block * kBlockSize;
  const int64_t last_row = std::min(first_row + kBlockSize, visibility.seqlen_q) - 1;
  // The blocks that hold the row's own positions and keep_local before them; none when not causal.
  const int64_t first_local = (first_row + visibility.shift()) / kBlockSize - params.keep_local;
  const int64_t last_own = visibility.causal ? (last_row + visibility.shift()) / kBlockSize : -1;
  const bool keep_row = params.keep_last && m_block == visibility.num_m_blocks() - 1;
  bool sink = params.keep_sink;
  for (int64_t n = 0; n < visibility.num_n_blocks(); ++n) {
    if (scratch.kinds[n] == BlockKind::kHidden) continue;
    const bool local = first_local <= n && n <= last_own;
    if (sink || local || keep_row || scratch.kinds[n] == BlockKind::kPartial) set_bit(mask_row, n);
    sink = false;  // only the first visible block
  }
}

}  // namespace

int64_t select_workspace_bytes(const SelectParams& params) {
  return params.visibility.num_run_bounds(kBlockSize) * static_cast<int64_t>(sizeof(RunBounds)) +
         params.execution.num_threads * scratch_bytes(params.visibility.num_n_blocks());
}

void run_select(const SelectParams& params) {
  const Visibility& visibility = params.visibility;
  const int64_t num_n_blocks = visibility.num_n_blocks(), num_m_blocks = visibility.num_m_blocks();
  const int64_t num_words = visibility.num_mask_words();
  auto* block_bounds = static_cast<RunBounds*>(params.execution.workspace);
  char* all_scratch = reinterpret_cast<char*>(block_bounds + visibility.num_run_bounds(kBlockSize));
  compute_run_bounds(visibility, kBlockSize, params.execution.num_threads, block_bounds);
  const auto select_rows = [&](int thread, int64_t begin, int64_t end) {
    char* own = all_scratch + thread * scratch_bytes(num_n_blocks);
    auto* keys = reinterpret_cast<uint64_t*>(own);
    const SelectScratch scratch{reinterpret_cast<BlockKind*>(keys + num_n_blocks), keys};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t m_block = row % num_m_blocks, head = row / num_m_blocks % visibility.num_heads;
      const int64_t batch = row / num_m_blocks / visibility.num_heads;
      const RunBounds* bounds = run_bounds_of(visibility, kBlockSize, block_bounds, batch, head);
      for (int64_t n = 0; n < num_n_blocks; ++n)
        scratch.kinds[n] = classify_block(visibility, bounds, m_block, n);
      uint32_t* mask_row = params.block_mask + row * num_words;
      std::fill(mask_row, mask_row + num_words, 0u);
      const float tau = params.head_thresholds
                            ? params.head_thresholds[head * params.head_threshold_stride]
                            : params.threshold;
      keep_top(params.block_scores + row * num_n_blocks, tau, num_n_blocks, scratch, mask_row);
      keep_by_rule(params, m_block, scratch, mask_row);
    }
  };
  constexpr int64_t kWorkPerBlock = 512;  // classify and sort, as multiply-adds of the kernels
  parallel_for(params.execution.num_threads, visibility.batch * visibility.num_heads * num_m_blocks,
               grain_for(num_n_blocks * kWorkPerBlock), select_rows);
}

}  // namespace rrattn::cpu
