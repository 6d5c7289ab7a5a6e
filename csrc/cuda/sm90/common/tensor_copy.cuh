// Bulk tensor copies (TMA) to shared memory.
#pragma once

#include <cuda.h>

#include "barrier.cuh"
#include "tensor_map.h"

namespace rrattn::cuda::sm90 {

// Copies the box at (column, row, head, batch), whose bytes the barrier counts.
__device__ inline void copy_box(void* to, const CUtensorMap& map, int column, int row, int head,
                                int batch, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch),
      "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier.raw())))
      : "memory");
}

// Copies `rows` rows of a head, panel after panel of kColumns columns.
template <int kPanels, int kColumns = kPanel, typename Element>
__device__ inline void copy_rows(Element* to, const CUtensorMap& map, int rows, int first_row,
                                 int head, int batch, Barrier& barrier) {
  for (int panel = 0; panel < kPanels; ++panel) {
    copy_box(to + panel * rows * kColumns, map, panel * kColumns, first_row, head, batch, barrier);
  }
}

// Brings the same rows to the L2 cache.
template <int kPanels, int kColumns = kPanel>
__device__ inline void prefetch_rows(const CUtensorMap& map, int first_row, int head, int batch) {
  for (int panel = 0; panel < kPanels; ++panel) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map),
                 "r"(panel * kColumns), "r"(first_row), "r"(head), "r"(batch)
                 : "memory");
  }
}

}  // namespace rrattn::cuda::sm90
