// The gradient of the sink, a logit of each head that joins the softmax of its rows and has no value:
//
//   grad_sink[h] = sum over the head's rows of exp(sink[h] - lse) (-delta + gradient of lse)
//
// The last factor is what dP starts from.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

constexpr int kSinkThreads = 1024;

// A thread block has the rows of a head. The order of the additions is always the same.
static __global__ void __launch_bounds__(kSinkThreads)
    finish_grad_sink_kernel(const __grid_constant__ KernelParams params) {
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int64_t padded = visibility.num_m_blocks() * kBlockSize;
  const float sink = backward.sink[blockIdx.x];
  double sum = 0;
  for (int64_t batch = 0; batch < visibility.batch; ++batch) {
    const int64_t head = batch * visibility.num_heads + blockIdx.x;
    for (int64_t row = threadIdx.x; row < visibility.seqlen_q; row += kSinkThreads) {
      const float lse = backward.lse[head * visibility.seqlen_q + row];
      if (lse == -INFINITY) continue;  // it sees nothing, not even the sink
      sum += static_cast<double>(expf(sink - lse)) *
             params.workspace.grad_score_start[head * padded + row];
    }
  }
  __shared__ double sums[kSinkThreads];
  sums[threadIdx.x] = sum;
  for (int threads = kSinkThreads / 2; threads > 0; threads /= 2) {
    __syncthreads();
    if (threadIdx.x < threads) sums[threadIdx.x] += sums[threadIdx.x + threads];
  }
  if (threadIdx.x == 0) backward.grad_sink[blockIdx.x] = static_cast<float>(sums[0]);
}

}  // namespace rrattn::cuda::sm90::backward
