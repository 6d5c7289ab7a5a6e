#include "../../core/dense_mask.h"
#include "dense_mask.h"
#include "launch.cuh"

namespace rrattn::cuda {

namespace {

constexpr int kThreads = 128;        // a key each
constexpr int kRowsPerThread = 256;  // of the mask, read by a thread block

// Adds the number of rows that see each key to start_rows, which start at 0.
template <typename Mask>
__global__ void __launch_bounds__(kThreads) count_rows_kernel(DenseMaskParams params) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (key >= params.seqlen_k) return;
  const int64_t head = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRowsPerThread;
  const int64_t end_row = min(first_row + kRowsPerThread, params.seqlen_q);
  const auto* mask = static_cast<const typename Mask::Storage*>(params.mask) +
                     head / params.num_heads * params.batch_stride +
                     head % params.num_heads * params.head_stride + key * params.key_stride;
  const int64_t own_row = key - (params.seqlen_k - params.seqlen_q);
  bool seen_before =
      first_row == 0 ? own_row < 0 : Mask::shows(mask[(first_row - 1) * params.row_stride]);
  int32_t count = 0, faults = 0, fault_value = kNoValue;
#pragma unroll 8
  for (int64_t row = first_row; row < end_row; ++row) {
    const auto value = mask[row * params.row_stride];
    const bool seen = Mask::shows(value);
    if (!seen && !Mask::hides(value)) {
      faults |= kNeitherSeenNorHidden;
      fault_value = max(fault_value, bits_of(value));
    }
    if (seen && !seen_before && row != own_row) faults |= kNotCausal;
    seen_before = seen;
    count += seen;
  }
  if (count > 0) atomicAdd(params.start_rows + head * params.seqlen_k + key, count);
  if (faults == 0) return;
  atomicOr(params.verdict, faults);
  atomicMax(params.verdict + 1, fault_value);
}

__global__ void __launch_bounds__(kThreads) start_rows_kernel(DenseMaskParams params) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (key >= params.seqlen_k) return;
  int32_t& at = params.start_rows[static_cast<int64_t>(blockIdx.z) * params.seqlen_k + key];
  at = start_row(key - (params.seqlen_k - params.seqlen_q), at);
}

__global__ void start_verdict_kernel(int32_t* verdict) {
  verdict[0] = 0;
  verdict[1] = kNoValue;
}

}  // namespace

int64_t DenseMaskStage::workspace_bytes(const DenseMaskParams&) { return 0; }

void DenseMaskStage::launch(const DenseMaskParams& params) {
  const auto stream = static_cast<cudaStream_t>(params.execution.stream);
  start_verdict_kernel<<<1, 1, 0, stream>>>(params.verdict);
  RRATTN_CUDA_CHECK(cudaGetLastError());
  const int64_t heads = params.batch * params.num_heads;
  if (heads == 0 || params.seqlen_k == 0) return;
  RRATTN_CUDA_CHECK(
      cudaMemsetAsync(params.start_rows, 0, heads * params.seqlen_k * sizeof(int32_t), stream));
  const auto key_blocks = static_cast<unsigned>(ceil_div(params.seqlen_k, kThreads));
  const auto row_blocks = static_cast<unsigned>(ceil_div(params.seqlen_q, kRowsPerThread));
  if (row_blocks > 0) {
    const dim3 grid(key_blocks, row_blocks, static_cast<unsigned>(heads));
    with_mask_type(params.type, [&](auto mask) {
      count_rows_kernel<decltype(mask)><<<grid, kThreads, 0, stream>>>(params);
    });
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  const dim3 grid(key_blocks, 1, static_cast<unsigned>(heads));
  start_rows_kernel<<<grid, kThreads, 0, stream>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
