// What the kernels that read rows before the gradients share: a row is read by 16 threads, of 8
// columns each.
#pragma once

#include "../../common/rows.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

constexpr int kPrepareThreads = 256;
constexpr int kRowLanes = 16;  // threads of a row
constexpr int kPrepareRows = kPrepareThreads / kRowLanes;

// A thread's 8 elements of a row. `aligned`: as aligned_rows says.
template <typename Element>
__device__ inline uint4 load_part(const Rows& rows, int64_t batch, int64_t head, int64_t row,
                                  int column, int head_dim, bool aligned) {
  return load_eight(static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
                        head * rows.head_stride + row * rows.row_stride,
                    column, head_dim, aligned);
}

// Element i of the eight.
template <typename Element>
__device__ inline float element(const uint4& eight, int i) {
  return static_cast<float>(reinterpret_cast<const Element*>(&eight)[i]);
}

// The sum over the threads of a row, in each of them.
__device__ inline float row_sum(float value) {
  for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(~0u, value, lanes);
  }
  return value;
}

}  // namespace rrattn::cuda::sm90::backward
