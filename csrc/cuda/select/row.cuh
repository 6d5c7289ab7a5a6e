// How the threads of a thread block share a row, and put together what each knows of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../core/params.h"

namespace rrattn::cuda::select {

// The words of a row of the mask, of which each warp has every kWarps-th. Block i of a word belongs
// to lane i.
template <int kWarps, int kWords>
class WarpWords {
  static constexpr int kTogether = 4;  // words between two checks for more

 public:
  // Anything before `end_block` may be visible: under the diagonal half of all, on average.
  __device__ explicit WarpWords(int end_block)
      : used_(max(0, ((end_block + 31) / 32 - warp() + kWarps - 1) / kWarps)) {}

  // Calls visit(i) for each word number(i) of this warp in which anything may be visible.
  template <typename Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (int first = 0; first < kWords; first += kTogether) {
      if (first >= used_) break;
#pragma unroll
      for (int i = first; i < min(first + kTogether, kWords); ++i) visit(i);
    }
  }

  __device__ static int number(int i) { return warp() + kWarps * i; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

 private:
  const int used_;
};

// The sum over a warp of values in [0, 2^55]: three sums of 27 bits each, which the hardware adds
// up in one step apiece.
__device__ inline long long warp_sum(long long value) {
  constexpr unsigned kDigit = (1u << 27) - 1;
  const unsigned low = __reduce_add_sync(~0u, static_cast<unsigned>(value) & kDigit);
  const unsigned middle = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 27) & kDigit);
  const unsigned high = __reduce_add_sync(~0u, static_cast<unsigned>(value >> 54));
  return low + (static_cast<long long>(middle) << 27) + (static_cast<long long>(high) << 54);
}

// Reductions over all warps of a row. Each is a barrier too.
template <int kWarps>
class RowReduction {
 public:
  // Two sets, in alternation, so that one barrier per reduction is enough.
  using Shared = long long[2][kWarps];

  __device__ explicit RowReduction(Shared& shared) : of_warps_(shared) {}

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
      set_ ^= 1;
      if (threadIdx.x % 32 == 0) of_warps_[set_][threadIdx.x / 32] = value;
      __syncthreads();
      value = static_cast<T>(of_warps_[set_][0]);
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp)
        value = operation(value, static_cast<T>(of_warps_[set_][warp]));
    }
    return value;
  }

  Shared& of_warps_;
  int set_ = 0;
};

}  // namespace rrattn::cuda::select
