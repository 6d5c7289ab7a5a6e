// The search for the cut of a row: the smallest score v with
//
//   mass of all scores above v < tau * row_sum
//
// It bisects on the bits of the score (non-negative floats order like their bits). A step adds up
// scores, since masses would double the registers. The sum tells on which side of the middle the
// cut is; where it is too close to the target to tell, masses are added up after all. The few
// scores that are left after some steps are compared each with each.
#pragma once

#include "row.cuh"

namespace rrattn::cuda::select {

constexpr int kMoreSteps = 4;  // of the search, while too many scores are left to gather

constexpr int floor_log2(int n) { return n <= 1 ? 0 : 1 + floor_log2(n / 2); }

// The mass as in csrc/cpu/select.cpp, from the bits of score * 2^32, which is exact in float.
__device__ inline long long mass_of(uint32_t bits) { return __float2ll_rn(__uint_as_float(bits)); }

// The least bits of a score times 2^32 that has at least this mass, which is below 2^53.
__device__ inline uint32_t bits_of_mass(long long mass) {
  if (mass <= 0) return 0;
  // All from half a unit below are rounded up to the mass, but the half itself to an even one.
  const uint32_t bits = __float_as_uint(__double2float_ru(static_cast<double>(mass) - 0.5));
  return mass_of(bits) < mass ? bits + 1 : bits;
}

// All scores above `bits` are kept, and some of the `ties` equal to it, from the lowest index on.
struct Cut {
  uint32_t bits;
  int ties;
  long long mass_above;
};

// The search, and what its threads know of the row: the bits of scores times 2^32.
template <int kWarps, int kWords>
class CutSearch {
  using Words = WarpWords<kWarps, kWords>;
  using ScoreBits = uint32_t[kWords];
  static constexpr int kCapacity = kWarps * 32;
  static constexpr int kSteps = floor_log2(kWarps * kWords);  // leave about 32 scores of a row

 public:
  struct Shared {
    uint32_t candidates[kCapacity];
    int num_candidates;
    Cut found;
    int ties_of_word[kWarps * kWords];
  };

  __device__ CutSearch(Shared& shared, const Words& words, const ScoreBits& score_bits,
                       RowReduction<kWarps>& reduction, float tau, long long row_sum)
      : shared_(shared),
        words_(words),
        score_bits_(score_bits),
        reduction_(reduction),
        target_(static_cast<double>(tau) * static_cast<double>(row_sum)) {
    // Sums of scores become shares of the row's sum, in units of 2^-31. They are off by at most
    // 2^-18 (32 roundings of a lane's sum, and some more) and half a unit of mass for each score.
    // `error` is twice that.
    to_share_ = 0x1p31f / static_cast<float>(row_sum);
    const float error = 0x1p-17f + 0x1p13f / static_cast<float>(row_sum);
    surely_fits_ = __float2uint_rd((tau - error) * 0x1p31f);  // 0 if negative
    may_fit_ = __float2uint_ru((tau + error) * 0x1p31f);      // at most 2^32 - 1
  }

  // The cut, which is in [low, high].
  __device__ Cut find(uint32_t low, uint32_t high) {
    long long mass_beyond;  // of the scores above high
    for (int steps = kSteps;; steps = kMoreSteps) {
      for (; steps > 0 && low < high; --steps) {
        const uint32_t middle = low + (high - low) / 2;
        if (fits_above(middle)) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      gather(low, high);
      mass_beyond = mass_above(high);
      if (low == high || shared_.num_candidates <= kCapacity) break;
    }
    if (low < high) {
      compare_candidates(mass_beyond);
      return shared_.found;
    }
    return {high, shared_.num_candidates, mass_beyond};
  }

  // Where not all ties are kept, the scores of the others become 0.
  __device__ void drop_ties(const Cut& cut, ScoreBits& score_bits) {
    const long long mass_at_cut = mass_of(cut.bits);
    if (fits(cut.mass_above + (cut.ties - 1) * mass_at_cut)) return;
    const int lane = Words::lane();
    words_.each([&](int i) {
      const uint32_t ties = __ballot_sync(~0u, score_bits[i] == cut.bits);
      if (lane == 0) shared_.ties_of_word[Words::number(i)] = __popc(ties);
    });
    __syncthreads();
    int ties_before = 0;
    words_.each([&](int i) {
      const int word = Words::number(i);
      ties_before += __reduce_add_sync(
          ~0u, lane < min(word, kWarps) ? shared_.ties_of_word[word - 1 - lane] : 0);
      const uint32_t ties = __ballot_sync(~0u, score_bits[i] == cut.bits);
      const long long rank = ties_before + __popc(ties & ((1u << lane) - 1));
      if (score_bits[i] == cut.bits && !fits(cut.mass_above + rank * mass_at_cut))
        score_bits[i] = 0;
    });
  }

 private:
  // Whether a score before which there is this mass is kept.
  __device__ bool fits(long long mass_before) const {
    return static_cast<double>(mass_before) < target_;
  }

  __device__ long long mass_above(uint32_t bits) {
    long long mass = 0;
    words_.each([&](int i) {
      if (score_bits_[i] > bits) mass += mass_of(score_bits_[i]);
    });
    return reduction_.sum(mass);
  }

  // fits(mass_above(bits)), mostly from the sum of the scores.
  __device__ bool fits_above(uint32_t bits) {
    float above = 0;
    words_.each([&](int i) {
      if (score_bits_[i] > bits) above += __uint_as_float(score_bits_[i]);
    });
    const uint32_t share = reduction_.sum(__float2uint_rn(above * to_share_));
    bool below = share < surely_fits_;
    if (!below && share <= may_fit_) below = fits(mass_above(bits));
    return below;
  }

  // Makes the scores in [low, high] the candidates, as many as there is room for, and counts them.
  __device__ void gather(uint32_t low, uint32_t high) {
    if (threadIdx.x == 0) shared_.num_candidates = 0;
    __syncthreads();
    words_.each([&](int i) {
      if (score_bits_[i] - low > high - low) return;
      const int at = atomicAdd(&shared_.num_candidates, 1);
      if (at < kCapacity) shared_.candidates[at] = score_bits_[i];
    });
  }

  // Finds which candidate is the cut. Above all of them there is `mass_beyond`.
  __device__ void compare_candidates(long long mass_beyond) {
    if (threadIdx.x < shared_.num_candidates) {
      const uint32_t bits = shared_.candidates[threadIdx.x];
      Cut own{bits, 0, mass_beyond};
      for (int i = 0; i < shared_.num_candidates; ++i) {
        const uint32_t other = shared_.candidates[i];
        if (other > bits) own.mass_above += mass_of(other);
        own.ties += other == bits;
      }
      if (fits(own.mass_above) && !fits(own.mass_above + own.ties * mass_of(bits))) {
        shared_.found = own;
      }
    }
    __syncthreads();
  }

  Shared& shared_;
  const Words& words_;
  const ScoreBits& score_bits_;
  RowReduction<kWarps>& reduction_;
  const double target_;
  float to_share_;
  uint32_t surely_fits_, may_fit_;
};

}  // namespace rrattn::cuda::select
