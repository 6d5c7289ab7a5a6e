// Top-tau selection on the GPU.
//
//   block_scores [B, Hq, Mq, Mk] float32  ->  block_mask [B, Hq, Mq, ceil(Mk / 32)]
//
// Same rules and same bits as csrc/cpu/select.cpp. A group of 1 to 8 warps takes a row and holds
// its scores in registers. Each word w of the mask belongs to one warp, and block 32 w + i to lane
// i of that warp. Instead of sorting, the group looks for the cut, the smallest score v with
//
//   mass of all scores above v < tau * row_sum
//
// All scores above v are kept. Of those equal to v, as many are kept, from the lowest index on, as
// fit the same inequality. Masses are integers, so they may be added in any order.
//
// The search bisects on the bits of the score (non-negative floats order like their bits). A step
// adds up scores, since masses would double the registers. The sum tells on which side of the
// middle the cut is; where it is too close to the target to tell, masses are added up after all.
// The few scores that are left after some steps are compared each with each.
#include "run_bounds.cuh"
#include "stages.h"

namespace rrattn::cuda {

namespace {

constexpr int kWordsPerWarp = 32;  // at most: 8 warps hold 8,192 blocks, 1M tokens
constexpr int kMoreSteps = 4;      // of the search, while too many scores are left to gather
constexpr int kTogether = 4;       // words of a lane between two checks for more
constexpr uint32_t kNothing = 0x7fffffff;  // above the bits of every score

constexpr int floor_log2(int n) { return n <= 1 ? 0 : 1 + floor_log2(n / 2); }

struct SelectKernelParams {
  SelectParams select;
  const RunBounds* block_bounds;
};

// The mass as in csrc/cpu/select.cpp, from the bits of score * 2^32, which is exact in float.
__device__ inline long long mass_of(uint32_t bits) { return __float2ll_rn(__uint_as_float(bits)); }

// The sum over a warp of values in [0, 2^55]: three sums of 27 bits each, which the hardware adds
// up in one step apiece.
__device__ inline long long warp_sum(long long value) {
  constexpr unsigned kDigit = (1u << 27) - 1;
  const unsigned low = __reduce_add_sync(~0u, static_cast<unsigned>(value) & kDigit);
  const unsigned middle = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 27) & kDigit);
  const unsigned high = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 54));
  return low + (static_cast<long long>(middle) << 27) + (static_cast<long long>(high) << 54);
}

// Reductions over the warps of a row. Each is a barrier too.
template <int kWarps>
class RowGroup {
 public:
  // Two sets, used in turn, so that one barrier per reduction is enough.
  using Shared = long long[2][kWarps];

  __device__ explicit RowGroup(Shared& shared) : of_warps_(shared) {}

  __device__ long long sum(long long value) {
    return combine(warp_sum(value), [](long long a, long long b) { return a + b; });
  }
  __device__ uint32_t sum(uint32_t value) {
    return combine(__reduce_add_sync(~0u, value), [](uint32_t a, uint32_t b) { return a + b; });
  }
  __device__ uint32_t max(uint32_t value) {
    return combine(__reduce_max_sync(~0u, value),
                   [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  }

 private:
  template <typename T, typename Operation>
  __device__ T combine(T value, const Operation& operation) {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      turn_ ^= 1;
      if (threadIdx.x % 32 == 0) of_warps_[turn_][threadIdx.x / 32] = value;
      __syncthreads();
      value = static_cast<T>(of_warps_[turn_][0]);
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp)
        value = operation(value, static_cast<T>(of_warps_[turn_][warp]));
    }
    return value;
  }

  Shared& of_warps_;
  int turn_ = 0;
};

// All scores above `bits` are kept, and some of the `ties` equal to it, from the lowest index on.
struct Cut {
  uint32_t bits;
  int ties;
  long long mass_above;
};

template <int kWarps, int kWords, bool kFlashMask>
__global__ void __launch_bounds__(kWarps * 32, 32 / kWarps)
    select_kernel(SelectKernelParams params) {
  constexpr int kCapacity = kWarps * 32;
  constexpr int kSteps = floor_log2(kWarps * kWords);  // leave about 32 scores of a row
  alignas(16) __shared__ typename RowGroup<kWarps>::Shared of_warps;
  __shared__ uint32_t candidates[kCapacity];
  __shared__ int num_candidates;
  __shared__ Cut found;
  __shared__ int ties_of_word[kWarps * kWords];
  const SelectParams& select = params.select;
  const Visibility& visibility = select.visibility;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int num_words = static_cast<int>(visibility.num_mask_words());
  const int row = static_cast<int>(blockIdx.x);
  const int m_block = row % num_m_blocks;
  const int head = row / num_m_blocks % static_cast<int>(visibility.num_heads);
  const float* scores = select.block_scores + static_cast<int64_t>(row) * num_n_blocks;
  const float tau = select.rules.threshold_of(head);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  RowGroup<kWarps> group(of_warps);

  const MaskRow mask_row = mask_row_of(visibility, m_block);
  const int end_block = mask_row.causal ? mask_row.end_own : num_n_blocks;

  // Words of this warp in which anything is visible: under the diagonal half of all, on average.
  const int used_words = max(0, ((end_block + 31) / 32 - warp + kWarps - 1) / kWarps);
  const auto each_word = [&](const auto& visit) {
#pragma unroll
    for (int first = 0; first < kWords; first += kTogether) {
      if (first >= used_words) break;
#pragma unroll
      for (int i = first; i < min(first + kTogether, kWords); ++i) visit(i);
    }
  };

  // This lane's blocks: 32 (warp + kWarps i) + lane. All loads are on their way before the first is
  // used. Hidden blocks score 0: with no mass, they are never at the cut, and rows without any mass
  // keep nothing here.
  float loaded[kWords];
  const int end_offset = end_block - static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int offset = kWarps * 32 * i;
    loaded[i] = offset < end_offset ? scores[threadIdx.x + offset] : 0;
  }
  const int own_word = warp + kWarps * lane;  // this lane's, in what is done by whole words
  uint32_t visible_bits = 0, partial_bits = 0;
  if constexpr (kFlashMask) {
    const RunBounds* bounds = run_bounds_of(visibility, kBlockSize, params.block_bounds,
                                            row / num_m_blocks / visibility.num_heads, head);
    each_word([&](int i) {
      const int n_block = (warp + kWarps * i) * 32 + lane;
      const BlockKind kind = n_block < end_block
                                 ? classify_block(visibility, bounds, m_block, n_block)
                                 : BlockKind::kHidden;
      if (kind == BlockKind::kHidden) loaded[i] = 0;
      const uint32_t visible = __ballot_sync(~0u, kind != BlockKind::kHidden);
      const uint32_t partial = __ballot_sync(~0u, kind == BlockKind::kPartial);
      if (lane == i) visible_bits = visible, partial_bits = partial;
    });
  }
  uint32_t score_bits[kWords];  // of scores times 2^32, which are masses but for the rounding
  long long mass = 0;
  uint32_t highest = 0, lowest = 0;  // the lowest that is not 0, negated
  each_word([&](int i) {
    score_bits[i] = __float_as_uint(fmaf(loaded[i], 0x1p32f, 0));  // -0 becomes 0
    mass += mass_of(score_bits[i]);
    highest = max(highest, score_bits[i]);
    lowest = max(lowest, 0u - score_bits[i]);
  });
  highest = group.max(highest);
  // The bits of negative scores and of NaN are greater as well.
  const bool keep_all = !(tau > 0 && tau < 1) || highest >= __float_as_uint(kScoreEnd * 0x1p32f);

  Cut cut{keep_all ? 0 : kNothing, 0, 0};
  const long long row_sum = keep_all ? 0 : group.sum(mass);
  if (row_sum > 0) {
    const double target = static_cast<double>(tau) * static_cast<double>(row_sum);
    const auto fits = [&](long long mass_before) {
      return static_cast<double>(mass_before) < target;
    };
    const auto mass_above = [&](uint32_t bits) {
      long long mass = 0;
      each_word([&](int i) {
        if (score_bits[i] > bits) mass += mass_of(score_bits[i]);
      });
      return group.sum(mass);
    };
    // Sums of scores become shares of the row's sum, in units of 2^-31. They are off by at most
    // 2^-18 (32 roundings of a lane's sum, and some more) and half a unit of mass for each score.
    // `error` is twice that.
    const float to_share = 0x1p31f / static_cast<float>(row_sum);
    const float error = 0x1p-17f + 0x1p13f / static_cast<float>(row_sum);
    const uint32_t surely_fits = __float2uint_rd((tau - error) * 0x1p31f);  // 0 if negative
    const uint32_t may_fit = __float2uint_ru((tau + error) * 0x1p31f);      // at most 2^32 - 1
    uint32_t low = 0u - group.max(lowest), high = highest;  // the cut is in [low, high]
    long long mass_beyond;                                  // of the scores above high
    for (int steps = kSteps;; steps = kMoreSteps) {
      for (; steps > 0 && low < high; --steps) {
        const uint32_t middle = low + (high - low) / 2;
        float above = 0;
        each_word([&](int i) {
          if (score_bits[i] > middle) above += __uint_as_float(score_bits[i]);
        });
        const uint32_t share = group.sum(__float2uint_rn(above * to_share));
        bool below = share < surely_fits;
        if (!below && share <= may_fit) below = fits(mass_above(middle));
        if (below) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      if (threadIdx.x == 0) num_candidates = 0;
      __syncthreads();
      each_word([&](int i) {
        if (score_bits[i] - low > high - low) return;
        const int at = atomicAdd(&num_candidates, 1);
        if (at < kCapacity) candidates[at] = score_bits[i];
      });
      mass_beyond = mass_above(high);
      if (low == high || num_candidates <= kCapacity) break;
    }
    if (low < high) {
      if (threadIdx.x < num_candidates) {
        const uint32_t bits = candidates[threadIdx.x];
        Cut own{bits, 0, mass_beyond};
        for (int i = 0; i < num_candidates; ++i) {
          const uint32_t other = candidates[i];
          if (other > bits) own.mass_above += mass_of(other);
          own.ties += other == bits;
        }
        if (fits(own.mass_above) && !fits(own.mass_above + own.ties * mass_of(bits))) found = own;
      }
      __syncthreads();
      cut = found;
    } else {
      cut = {high, num_candidates, mass_beyond};
    }

    // Where not all ties are kept, the scores of the others become 0.
    const long long mass_at_cut = mass_of(cut.bits);
    if (!fits(cut.mass_above + (cut.ties - 1) * mass_at_cut)) {
      each_word([&](int i) {
        const uint32_t ties = __ballot_sync(~0u, score_bits[i] == cut.bits);
        if (lane == 0) ties_of_word[warp + kWarps * i] = __popc(ties);
      });
      __syncthreads();
      int ties_before = 0;
      each_word([&](int i) {
        const int word = warp + kWarps * i;
        ties_before +=
            __reduce_add_sync(~0u, lane < min(word, kWarps) ? ties_of_word[word - 1 - lane] : 0);
        const uint32_t ties = __ballot_sync(~0u, score_bits[i] == cut.bits);
        const long long rank = ties_before + __popc(ties & ((1u << lane) - 1));
        if (score_bits[i] == cut.bits && !fits(cut.mass_above + rank * mass_at_cut))
          score_bits[i] = 0;
      });
    }
  }

  uint32_t kept_bits = 0;
  each_word([&](int i) {
    const uint32_t kept = __ballot_sync(~0u, score_bits[i] >= cut.bits);
    if (lane == i) kept_bits = kept;
  });
  uint32_t first_visible = 0;
  if constexpr (!kFlashMask) {
    visible_bits = bits_before(end_block, own_word);
  } else {
    const uint32_t first = visible_bits ? own_word * 32 + __ffs(visible_bits) - 1 : ~0u;
    first_visible = ~group.max(~first);
  }
  if (lane >= kWords || own_word >= num_words) return;
  kept_bits |= kept_by_rule(select.rules, mask_row, static_cast<int>(first_visible), own_word);
  select.block_mask[static_cast<int64_t>(row) * num_words + own_word] =
      (kept_bits | partial_bits) & visible_bits;
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
  if (params.visibility.num_mask_words() > 8 * kWordsPerWarp) {
    throw std::invalid_argument("seqlen_k is " + std::to_string(params.visibility.seqlen_k) +
                                ", but must be at most " +
                                std::to_string(8 * kWordsPerWarp * 32 * kBlockSize) + " on a GPU");
  }
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
  if (num_words <= 2) return launch<1, 2>(kernel_params, stream);
  if (num_words <= 8) return launch<1, 8>(kernel_params, stream);
  if (num_words <= 32) return launch<2, 16>(kernel_params, stream);
  if (num_words <= 64) return launch<4, 16>(kernel_params, stream);
  return launch<8, 32>(kernel_params, stream);
}

}  // namespace rrattn::cuda
