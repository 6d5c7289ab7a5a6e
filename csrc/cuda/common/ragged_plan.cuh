// What kernels need of the plan of a ragged batch.
#pragma once

#include "../ragged_stage.h"
#include "estimate/items.cuh"

namespace rrattn::cuda {

struct RaggedEstimate {
  EstimateCall call;
  estimate::WorkLayout layout;
};

// The request that has part `at` of all, by one of the lists of firsts.
__device__ inline int request_of(const int* firsts, int num_requests, int at) {
  int low = 0, high = num_requests - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (firsts[middle] <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace rrattn::cuda
