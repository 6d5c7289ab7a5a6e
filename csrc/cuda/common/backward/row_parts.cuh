// What the kernels that read rows before the gradients share: a row of kColumns columns is read by
// threads side by side, each with 8 of its columns.
#pragma once

#include "../rows.cuh"
#include "workspace.cuh"

namespace rrattn::cuda::backward {

constexpr int kPrepareThreads = 256;
template <int kColumns>
constexpr int kRowLanes = kColumns / 8;  // threads of a row
template <int kColumns>
constexpr int kPrepareRows = kPrepareThreads / kRowLanes<kColumns>;

// A thread's 8 elements of a row. `aligned`: as aligned_rows says.
template <typename Element>
__device__ inline uint4 load_part(const Rows& rows, int64_t batch, int64_t head, int64_t row,
                                  int column, int head_dim, bool aligned) {
  return load_eight(static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
                        head * rows.head_stride + row * rows.row_stride,
                    column, head_dim, aligned);
}

}  // namespace rrattn::cuda::backward
