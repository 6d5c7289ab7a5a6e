// From the accumulators of a product on tensor cores to rows in memory.
#pragma once

#include <cute/tensor.hpp>

namespace rrattn::cuda {

// Before, word c of lane t of a quad is part t of chunk c; afterwards it is part c of chunk t.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const uint32_t near0 = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
  const uint32_t near1 = __shfl_xor_sync(~0u, odd ? words[2] : words[3], 1);
  const uint32_t low0 = odd ? near0 : words[0], low1 = odd ? words[1] : near0;
  const uint32_t high0 = odd ? near1 : words[2], high1 = odd ? words[3] : near1;
  const uint32_t far0 = __shfl_xor_sync(~0u, upper ? low0 : high0, 2);
  const uint32_t far1 = __shfl_xor_sync(~0u, upper ? low1 : high1, 2);
  words[0] = upper ? far0 : low0;
  words[1] = upper ? far1 : low1;
  words[2] = upper ? high0 : far0;
  words[3] = upper ? high1 : far1;
}

// Stores `scale` times one of the thread's two rows of accumulators, the second of which (`half` 1)
// is 8 rows further on, to head_dim elements from `row` on. A quad holds a row; each of its lanes
// stores 16 bytes at a time.
template <typename Element, typename Accumulators>
__device__ inline void store_row(const Accumulators& accumulators, int half, float scale,
                                 Element* row, bool valid, int head_dim, bool aligned) {
  static_assert(decltype(cute::size(accumulators))::value % 16 == 0);  // 32 columns
#pragma unroll
  for (int four = 0; four < cute::size(accumulators) / 16; ++four) {  // chunks of 8 columns
    uint32_t words[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = (four * 4 + c) * 4 + half * 2;
      const Element pair[2] = {static_cast<Element>(accumulators(i) * scale),
                               static_cast<Element>(accumulators(i + 1) * scale)};
      words[c] = *reinterpret_cast<const uint32_t*>(pair);
    }
    transpose_quad(words);
    const int column = (four * 4 + static_cast<int>(threadIdx.x) % 4) * 8;
    if (!valid || column >= head_dim) continue;
    if (aligned) {
      *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) row[column + e] = reinterpret_cast<const Element*>(words)[e];
    }
  }
}

}  // namespace rrattn::cuda
