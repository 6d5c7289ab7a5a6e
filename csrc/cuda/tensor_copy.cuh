// Bulk tensor copies (TMA) to shared memory.
#pragma once

#include <cuda.h>

#include "barrier.cuh"

namespace rrattn::cuda {

// Copies the box at (column, row, head, batch); the barrier counts its bytes.
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

}  // namespace rrattn::cuda
