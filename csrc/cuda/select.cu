// Top-tau selection on the GPU.
//
//   block_scores [B, Hq, Mq, Mk] float32  ->  block_mask [B, Hq, Mq, ceil(Mk / 32)]
//
// Same rules and same bits as csrc/cpu/select.cpp. A group of 1 to 8 warps takes a row and holds
// its scores in registers; word w of the mask is the business of one warp, lane i of block 32 w +
// i. Instead of sorting, it bisects on the bits of the score (non-negative floats order like their
// bits) for the smallest score v with
//
//   mass of all scores above v < tau * row_sum
//
// All scores above v are kept, and of those equal to v as many, from the lowest index on, as fit
// the same inequality. Masses are integers, so the order of addition is free.
#include "run_bounds.cuh"
#include "stages.h"

namespace rrattn::cuda {

namespace {

constexpr int kWordsPerWarp = 32;  // at most: 8 warps hold 8,192 blocks, 1M tokens
constexpr int kSteps = 8;          // of a search of long rows, before what is left is gathered
constexpr int kTogether = 4;       // words of a lane, between two looks at whether there are more
constexpr int kNothing = 0x7fffffff;  // above the bits of every score

struct SelectKernelParams {
  SelectParams select;
  const RunBounds* block_bounds;
};

__device__ inline long long mass_of(float score) {
  return __double2ll_rn(static_cast<double>(score) * 0x1p32);
}

// The sum over a warp of values in [0, 2^55): three sums of 27 bits each, which the hardware adds
// up in one step apiece.
__device__ inline long long warp_sum(long long value) {
  constexpr unsigned kDigit = (1u << 27) - 1;
  const unsigned low = __reduce_add_sync(~0u, static_cast<unsigned>(value) & kDigit);
  const unsigned middle = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 27) & kDigit);
  const unsigned high = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 54));
  return low + (static_cast<long long>(middle) << 27) + (static_cast<long long>(high) << 54);
}

// Reductions over the warps of a row.
template <int kWarps>
struct RowGroup {
  long long (*sums)[kWarps];  // two sets in shared memory each, used in turn, so that one barrier
  int (*lows)[kWarps];        // a reduction is enough
  int (*highs)[kWarps];
  int turn = 0;

  struct Result {
    long long sum;
    int low, high;
  };

  __device__ Result reduce(long long sum, int low, int high) {
    sum = warp_sum(sum);
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if constexpr (kWarps > 1) {
      turn ^= 1;
      if (threadIdx.x % 32 == 0) {
        sums[turn][threadIdx.x / 32] = sum;
        lows[turn][threadIdx.x / 32] = low;
        highs[turn][threadIdx.x / 32] = high;
      }
      __syncthreads();
      sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        sum += sums[turn][warp];
        low = min(low, lows[turn][warp]);
        high = max(high, highs[turn][warp]);
      }
    }
    return {sum, low, high};
  }
};

template <int kWarps, int kWords, bool kFlashMask>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 8 ? 2 : 1)
    select_kernel(SelectKernelParams params) {
  __shared__ long long sums[2][kWarps];
  __shared__ int lows[2][kWarps], highs[2][kWarps];
  __shared__ int ties_of_word[kWarps * kWords];
  constexpr int kCandidates = kWarps * 32 * 2;
  __shared__ int candidates[kCandidates], num_candidates;
  const SelectParams& select = params.select;
  const Visibility& visibility = select.visibility;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int num_words = static_cast<int>(visibility.num_mask_words());
  const int row = static_cast<int>(blockIdx.x);
  const int m_block = row % num_m_blocks;
  const int head = row / num_m_blocks % static_cast<int>(visibility.num_heads);
  const float* scores = select.block_scores + static_cast<int64_t>(row) * num_n_blocks;
  const float tau = select.head_thresholds
                        ? select.head_thresholds[head * select.head_threshold_stride]
                        : select.threshold;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  RowGroup<kWarps> group{sums, lows, highs};

  // The blocks that hold the row's own positions, and keep_local before them; when causal, later
  // ones are hidden.
  const int64_t first_row = static_cast<int64_t>(m_block) * kBlockSize;
  const int64_t last_row = min(first_row + kBlockSize, visibility.seqlen_q) - 1;
  const int first_local =
      static_cast<int>((first_row + visibility.shift()) / kBlockSize - select.keep_local);
  const int last_own = static_cast<int>((last_row + visibility.shift()) / kBlockSize);
  const int end_block = visibility.causal ? last_own + 1 : num_n_blocks;

  // Words of this warp with anything visible: under the diagonal, half of all on average.
  const int used_words = max(0, ((end_block + 31) / 32 - warp + kWarps - 1) / kWarps);

  // This lane's blocks: 32 (warp + kWarps i) + lane. All loads are on their way before the first is
  // used.
  float loaded[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int n_block = (warp + kWarps * i) * 32 + lane;
    loaded[i] = n_block < end_block ? scores[n_block] : 0;
  }
  int score_bits[kWords];  // -1, below all others, for hidden blocks
  long long masses[kWords];
  uint32_t partial_words = 0;  // bit i: block i is partly masked by FlashMask
  bool keep_all = !(tau > 0 && tau < 1);
  long long mass = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int n_block = (warp + kWarps * i) * 32 + lane;
    bool visible = n_block < end_block;
    if (kFlashMask && visible) {
      const RunBounds* bounds = run_bounds_of(visibility, kBlockSize, params.block_bounds,
                                              row / num_m_blocks / visibility.num_heads, head);
      const BlockKind kind = classify_block(visibility, bounds, m_block, n_block);
      visible = kind != BlockKind::kHidden;
      if (kind == BlockKind::kPartial) partial_words |= 1u << i;
    }
    const float score = loaded[i] + 0.0f;  // -0 becomes 0
    const bool usable = score >= 0 && score < kScoreEnd;
    keep_all |= visible && !usable;
    score_bits[i] = !visible ? -1 : usable ? __float_as_int(score) : 0;
    masses[i] = visible && usable ? mass_of(score) : 0;
    mass += masses[i];
  }
  keep_all = __syncthreads_or(keep_all);

  int cut = kNothing;        // everything above is kept
  long long mass_above = 0;  // of what is above
  double target = 0;
  if (!keep_all) {
    int lowest = kNothing, highest = -1;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (score_bits[i] < 0) continue;
      lowest = min(lowest, score_bits[i]);
      highest = max(highest, score_bits[i]);
    }
    const auto row = group.reduce(mass, lowest, highest);
    target = static_cast<double>(tau) * static_cast<double>(row.sum);
    // The cut is one of the scores in [low, high]; the bounds are scores too, so that they close in
    // fast. A row that sums to 0 keeps nothing here.
    int low = row.low, high = row.sum > 0 ? row.high : row.low;
    // Up to that many halvings, over values that hold all scores in [low, high]; mass_beyond is
    // that of the greater scores that are not among them.
    const auto search = [&](const auto& bits, const auto& bit_masses, int used, int steps,
                            long long mass_beyond) {
      for (; steps > 0 && low < high; --steps) {
        const int middle = low + (high - low) / 2;
        long long above = 0;
        int next_low = kNothing,
            next_high = -1;  // the least score above the middle, the largest up to it
        constexpr int kCount = sizeof(bits) / sizeof(bits[0]);
#pragma unroll
        for (int first = 0; first < kCount; first += kTogether) {
          if (first >= used) break;
#pragma unroll
          for (int i = first; i < min(first + kTogether, kCount); ++i) {
            const bool is_above = bits[i] > middle;
            above += is_above ? bit_masses[i] : 0;
            next_low = min(next_low, is_above ? bits[i] : kNothing);
            next_high = max(next_high, is_above ? -1 : bits[i]);
          }
        }
        auto split = group.reduce(above, next_low, next_high);
        split.sum += mass_beyond;
        if (static_cast<double>(split.sum) < target) {
          high = split.high;
          mass_above = split.sum;
        } else {
          low = split.low;
        }
      }
    };
    // Of a long row the few scores that are left after some steps are gathered, and the rest of the
    // search is over these alone: 0.59 ms in place of 0.72 for 4,096 rows of 8,192 blocks on an
    // H200. For rows of 1,024 it does not pay.
    constexpr bool kGather = kWarps == 8;
    while (low < high) {
      search(score_bits, masses, used_words, kGather ? kSteps : kNothing, 0);
      if (!kGather || low == high) break;
      if (threadIdx.x == 0) num_candidates = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (i >= used_words) break;
        const bool candidate = low <= score_bits[i] && score_bits[i] <= high;
        const uint32_t all = __ballot_sync(~0u, candidate);
        if (all == 0) continue;
        int first = 0;
        if (lane == 0) first = atomicAdd(&num_candidates, __popc(all));
        const int at = __shfl_sync(~0u, first, 0) + __popc(all & ((1u << lane) - 1));
        if (candidate && at < kCandidates) candidates[at] = score_bits[i];
      }
      __syncthreads();
      if (num_candidates > kCandidates) continue;
      int candidate_bits[2];
      long long candidate_masses[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = threadIdx.x + i * kWarps * 32;
        candidate_bits[i] = at < num_candidates ? candidates[at] : -1;
        candidate_masses[i] = mass_of(__int_as_float(max(candidate_bits[i], 0)));
      }
      search(candidate_bits, candidate_masses, 2, 32, mass_above);
    }
    if (row.sum > 0) cut = high;
  }

  // Ties at the cut before each word, where there is more than one.
  int own_ties = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) own_ties += !keep_all && score_bits[i] == cut;
  const bool many_ties = __syncthreads_count(own_ties) > 1 || __syncthreads_or(own_ties > 1);
  if (many_ties) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t ties = __ballot_sync(~0u, score_bits[i] == cut);
      if (lane == 0) ties_of_word[warp + kWarps * i] = __popc(ties);
    }
    __syncthreads();
  }

  const bool keep_row = select.keep_last && m_block == num_m_blocks - 1;
  const long long mass_at_cut = cut < kNothing ? mass_of(__int_as_float(cut)) : 0;
  int ties_before = 0, next_word = 0;
  int first_visible = num_n_blocks;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int word = warp + kWarps * i;
    const uint32_t visible = __ballot_sync(~0u, score_bits[i] >= 0);
    if (visible && first_visible == num_n_blocks) first_visible = word * 32 + __ffs(visible) - 1;
  }
  if constexpr (kWarps > 1) {
    __shared__ int first_visible_of_warp[kWarps];
    if (lane == 0) first_visible_of_warp[warp] = first_visible;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) first_visible = min(first_visible, first_visible_of_warp[w]);
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int word = warp + kWarps * i;
    if (word >= num_words) break;
    const int n_block = word * 32 + lane;
    const bool visible = score_bits[i] >= 0;
    bool keep = keep_all || score_bits[i] > cut;
    if (!keep_all) {
      const bool tie = score_bits[i] == cut;
      long long rank = 0;  // of this tie among all
      if (many_ties) {
        for (; next_word < word; ++next_word) ties_before += ties_of_word[next_word];
        rank = ties_before + __popc(__ballot_sync(~0u, tie) & ((1u << lane) - 1));
      }
      keep |= tie && static_cast<double>(mass_above + rank * mass_at_cut) < target;
    }
    keep |= keep_row || (visibility.causal && first_local <= n_block && n_block <= last_own) ||
            (partial_words >> i & 1) || (select.keep_sink && n_block == first_visible);
    const uint32_t bits = __ballot_sync(~0u, keep && visible);
    if (lane == 0) select.block_mask[static_cast<int64_t>(row) * num_words + word] = bits;
  }
}

template <int kWarps, int kWords>
void launch(const SelectKernelParams& params, cudaStream_t stream) {
  const Visibility& visibility = params.select.visibility;
  const int64_t num_rows = visibility.batch * visibility.num_heads * visibility.num_m_blocks();
  if (num_rows == 0) return;
  const auto kernel = visibility.row_bounds.data ? select_kernel<kWarps, kWords, true>
                                                 : select_kernel<kWarps, kWords, false>;
  kernel<<<static_cast<unsigned>(num_rows), kWarps * 32, 0, stream>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

int64_t select_workspace_bytes(const SelectParams& params) {
  Arena arena;
  arena.take<RunBounds>(params.visibility.num_run_bounds(kBlockSize));
  return arena.used();
}

void run_select(const SelectParams& params) {
  num_multiprocessors();  // throws on a GPU that is not supported
  const auto stream = static_cast<cudaStream_t>(params.execution.stream);
  Arena arena(params.execution.workspace);
  const SelectKernelParams kernel_params{
      params, arena.take<RunBounds>(params.visibility.num_run_bounds(kBlockSize))};
  compute_run_bounds(params.visibility, kBlockSize,
                     const_cast<RunBounds*>(kernel_params.block_bounds), stream);

  const int64_t num_words = params.visibility.num_mask_words();
  if (num_words > 8 * kWordsPerWarp) {
    throw std::invalid_argument("seqlen_k is " + std::to_string(params.visibility.seqlen_k) +
                                ", but must be at most " +
                                std::to_string(8 * kWordsPerWarp * 32 * kBlockSize) + " on a GPU");
  }
  if (num_words <= 2) return launch<1, 2>(kernel_params, stream);
  if (num_words <= 8) return launch<1, 8>(kernel_params, stream);
  if (num_words <= 32) return launch<2, 16>(kernel_params, stream);
  if (num_words <= 64) return launch<4, 16>(kernel_params, stream);
  return launch<8, 32>(kernel_params, stream);
}

}  // namespace rrattn::cuda
