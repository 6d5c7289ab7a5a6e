#include "finish_grad_sink.cuh"

namespace rrattn::cuda::backward {

namespace {

constexpr int kThreads = 1024;

// A thread block has the rows of a head. The order of the additions is always the same.
__global__ void __launch_bounds__(kThreads)
    finish_grad_sink_kernel(const __grid_constant__ BackwardParams params,
                            const float* grad_score_start) {
  const Visibility& visibility = params.visibility;
  const int64_t padded = visibility.num_m_blocks() * kBlockSize;
  const float sink = params.sink[blockIdx.x];
  double sum = 0;
  for (int64_t batch = 0; batch < visibility.batch; ++batch) {
    const int64_t head = batch * visibility.num_heads + blockIdx.x;
    for (int64_t row = threadIdx.x; row < visibility.seqlen_q; row += kThreads) {
      const float lse = params.lse[head * visibility.seqlen_q + row];
      if (lse == -INFINITY) continue;  // it sees nothing, not even the sink
      sum += static_cast<double>(expf(sink - lse)) * grad_score_start[head * padded + row];
    }
  }
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int threads = kThreads / 2; threads > 0; threads /= 2) {
    __syncthreads();
    if (threadIdx.x < threads) sums[threadIdx.x] += sums[threadIdx.x + threads];
  }
  if (threadIdx.x == 0) params.grad_sink[blockIdx.x] = static_cast<float>(sums[0]);
}

}  // namespace

void finish_grad_sink(const BackwardParams& params, const Workspace& workspace) {
  const auto grid = static_cast<unsigned>(params.visibility.num_heads);
  if (params.sink == nullptr || grid == 0) return;
  finish_grad_sink_kernel<<<grid, kThreads, 0, stream_of(params.execution)>>>(
      params, workspace.grad_score_start);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::backward
