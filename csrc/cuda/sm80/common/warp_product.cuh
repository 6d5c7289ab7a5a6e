// Products of tiles in shared memory, of which each warp computes a part.
#pragma once

#include <cute/tensor.hpp>

#include "tensor_cores.cuh"

namespace rrattn::cuda::sm80 {

// An operand of a product: a tile of kRows rows in shared memory, from the warp's first row or column on
// that is not summed over. kSummedRows: the rows are what is summed over, else the columns.
//
// The parts of a tile's columns are powers of 2, so that places in them differ in bits of their own.
template <int kRows, bool kSummedRows, bool kSecond>
class Operand {
 public:
  __device__ Operand(uint32_t tile, int first) {
    // The second of a product has the rows and columns of its 8 x 8 matrices the other way round.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool swapped = kSummedRows != kSecond;
    const int row = (swapped ? lane / 16 : lane / 8 % 2) * 8 + lane % 8;
    const int column = (swapped ? lane / 8 % 2 : lane / 16) * 8;
    place_ = kSummedRows ? TilePlace::of<kRows>(tile, row, first + column)
                         : TilePlace::of<kRows>(tile, first + row, column);
  }

  // The fragment of 16 x 16 elements, `i` from the warp's first, `k` along what is summed over.
  __device__ void load(uint32_t (&to)[4], int i, int k) const {
    if constexpr (kSummedRows) {
      load_matrices_transposed(to, place_.template at<kRows>(k, i));
    } else {
      load_matrices(to, place_.template at<kRows>(i, k));
    }
  }

 private:
  TilePlace place_;
};

template <int kRows, bool kSummedRows>
using FirstOperand = Operand<kRows, kSummedRows, false>;
template <int kRows, bool kSummedRows>
using SecondOperand = Operand<kRows, kSummedRows, true>;

// The accumulators of 16 rows and kColumns columns of a warp.
template <int kColumns>
using RowSums = decltype(cute::make_tensor<float>(cute::Int<kColumns / 2>{}));

// The four accumulators from i on += the product of a 16 x 16 and a 16 x 8 fragment.
template <typename Element, typename Sums>
__device__ inline void multiply_add(Sums& sums, int i, const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  WarpMma<Element>::fma(sums(i), sums(i + 1), sums(i + 2), sums(i + 3), a[0], a[1], a[2], a[3], b0,
                        b1, sums(i), sums(i + 1), sums(i + 2), sums(i + 3));
}

// sums += A B over kSummed rows or columns of both. `beside(part, parts)` is called after each of the parts of
// the product.
template <typename Element, int kSummed, int kFragments, typename Sums, typename First,
          typename Second, typename Beside>
__device__ inline void multiply_add(Sums (&sums)[kFragments], const First& first,
                                    const Second& second, const Beside& beside) {
  constexpr int kColumns = decltype(cute::size(sums[0]))::value * 2;
#pragma unroll
  for (int k = 0; k < kSummed; k += 16) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) first.load(a[m], m * 16, k);
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      uint32_t b[4];
      second.load(b, n, k);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        multiply_add<Element>(sums[m], n / 2, a[m], b[0], b[1]);
        multiply_add<Element>(sums[m], n / 2 + 4, a[m], b[2], b[3]);
      }
      beside((k * kColumns / 16 + n) / 16, kSummed * kColumns / 256);
    }
  }
}

template <typename Element, int kSummed, int kFragments, typename Sums, typename First,
          typename Second>
__device__ inline void multiply_add(Sums (&sums)[kFragments], const First& first,
                                    const Second& second) {
  multiply_add<Element, kSummed>(sums, first, second, [](int, int) {});
}

}  // namespace rrattn::cuda::sm80
