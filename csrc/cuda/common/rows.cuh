// Reading rows of 2-byte elements, eight at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../core/params.h"

namespace rrattn::cuda {

// The 8 elements of a row from `column` on, zeros past the head size.
template <typename Element>
__device__ inline uint4 load_eight(const Element* row, int column, int head_dim, bool aligned) {
  uint4 eight = make_uint4(0, 0, 0, 0);
  if (column >= head_dim) return eight;
  if (aligned) return *reinterpret_cast<const uint4*>(row + column);
  for (int i = 0; i < 8; ++i) reinterpret_cast<Element*>(&eight)[i] = row[column + i];
  return eight;
}

// Element i of the eight.
template <typename Element>
__device__ inline float element(const uint4& eight, int i) {
  return static_cast<float>(reinterpret_cast<const Element*>(&eight)[i]);
}

// The sum over the kLanes neighbouring threads of a row, in each of them.
template <int kLanes>
__device__ inline float row_sum(float value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(~0u, value, lanes);
  }
  return value;
}

inline bool aligned_rows(const Rows& rows) {
  return (reinterpret_cast<uintptr_t>(rows.data) | rows.batch_stride * 2 | rows.row_stride * 2 |
          rows.head_stride * 2) %
             16 ==
         0;
}

}  // namespace rrattn::cuda
