// From the accumulators of a product on tensor cores to rows in memory.
#pragma once

#include <cute/tensor.hpp>
#include <utility>

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

// A chunk of 8 columns of `scale` times one of the thread's two rows of accumulators, the second of which
// (`half` 1) is 8 rows further on. A quad holds a row, and each of its lanes gets a chunk of every four.
template <typename Element, typename Accumulators>
__device__ inline void take_chunk(const Accumulators& accumulators, int four, int half, float scale,
                                  uint32_t (&words)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int i = (four * 4 + c) * 4 + half * 2;
    const Element pair[2] = {static_cast<Element>(accumulators(i) * scale),
                             static_cast<Element>(accumulators(i + 1) * scale)};
    words[c] = *reinterpret_cast<const uint32_t*>(pair);
  }
  transpose_quad(words);
}

// Stores such a chunk to its place in a row of head_dim elements, if that is valid, 16 bytes at once if
// it is aligned.
template <typename Element>
__device__ inline void store_chunk(const uint32_t (&words)[4], int four, Element* row, bool valid,
                                   int head_dim, bool aligned) {
  const int column = (four * 4 + static_cast<int>(threadIdx.x) % 4) * 8;
  if (!valid || column >= head_dim) return;
  if (aligned) {
    *reinterpret_cast<uint4*>(row + column) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) row[column + e] = reinterpret_cast<const Element*>(words)[e];
  }
}

// Fours of chunks of a row of accumulators.
template <typename Accumulators>
struct Fours {
  static constexpr int kSize = decltype(cute::size(std::declval<Accumulators>()))::value;
  static_assert(kSize % 16 == 0);  // 32 columns
  static constexpr int kCount = kSize / 16;
};

// Stores `scale` times one of the thread's two rows of accumulators to `row`, if that is valid.
template <typename Element, typename Accumulators>
__device__ inline void store_row(const Accumulators& accumulators, int half, float scale,
                                 Element* row, bool valid, int head_dim, bool aligned) {
#pragma unroll
  for (int four = 0; four < Fours<Accumulators>::kCount; ++four) {
    uint32_t words[4];
    take_chunk<Element>(accumulators, four, half, scale, words);
    store_chunk(words, four, row, valid, head_dim, aligned);
  }
}

// Stores both rows. All shuffles come before the first store: with a branch after each four of chunks
// they would wait for one another. It takes registers for both rows.
template <typename Element, typename Accumulators>
__device__ inline void store_rows(const Accumulators& accumulators, const float (&scales)[2],
                                  Element* const (&rows)[2], const bool (&valid)[2], int head_dim,
                                  bool aligned) {
  constexpr int kFours = Fours<Accumulators>::kCount;
  uint32_t words[2][kFours][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      take_chunk<Element>(accumulators, four, half, scales[half], words[half][four]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      if (valid[half]) store_chunk(words[half][four], four, rows[half], true, head_dim, aligned);
    }
  }
}

}  // namespace rrattn::cuda
