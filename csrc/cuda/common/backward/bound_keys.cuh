// In deterministic mode: the bounds of keys and values from which the units of the sums of dQ come.
#pragma once

#include "../heads.cuh"
#include "row_parts.cuh"

namespace rrattn::cuda::backward {

constexpr int kThreadBlocksPerHead = 64;  // share the keys of a head

// Finds the largest |K| of each column and the largest |V_j|^2 among the keys that any query sees.
// A NaN counts as the largest: its bits are above those of all numbers.
template <typename Element, int kColumns>
__global__ void __launch_bounds__(kPrepareThreads)
    bound_keys_kernel(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ Workspace workspace, bool aligned) {
  constexpr int kLanes = kRowLanes<kColumns>, kRows = kPrepareRows<kColumns>;
  const Visibility& visibility = params.visibility;
  const int64_t key_head = blockIdx.y;  // of all batch entries
  const int64_t head = key_head % params.heads.num_heads_k;
  const int64_t batch = key_head / params.heads.num_heads_k;
  const int64_t group = group_size(visibility, params.heads);
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int row = static_cast<int>(threadIdx.x) / kLanes;
  const auto eight = [&](const Rows& rows, int64_t key, int64_t head_dim) {
    return load_part<Element>(rows, batch, head, key, column, static_cast<int>(head_dim), aligned);
  };
  __shared__ uint32_t shared_largest[kColumns], shared_largest_norm;
  static_assert(kColumns <= kPrepareThreads);
  if (threadIdx.x < kColumns) shared_largest[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared_largest_norm = 0;
  __syncthreads();
  uint32_t largest[8] = {}, largest_norm = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < visibility.seqlen_k;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const bool seen = first + row < visibility.seqlen_k &&
                      seen_by_group(visibility, group, batch, head, first + row);
    const uint4 none = make_uint4(0, 0, 0, 0);
    const uint4 keys = seen ? eight(params.key, first + row, params.heads.head_dim) : none;
    const uint4 values = seen ? eight(params.value, first + row, params.heads.head_dim_v) : none;
    float norm = 0;
    for (int e = 0; e < 8; ++e) {
      const float value = element<Element>(values, e);
      norm += value * value;
      largest[e] = max(largest[e], __float_as_uint(fabsf(element<Element>(keys, e))));
    }
    largest_norm = max(largest_norm, __float_as_uint(fabsf(row_sum<kLanes>(norm))));
  }
  for (int e = 0; e < 8; ++e) atomicMax(shared_largest + column + e, largest[e]);
  atomicMax(&shared_largest_norm, largest_norm);
  __syncthreads();
  if (threadIdx.x < kColumns) {
    atomicMax(workspace.key_column + key_head * kColumns + threadIdx.x,
              shared_largest[threadIdx.x]);
  }
  if (threadIdx.x == 0) atomicMax(workspace.value_norm + key_head, shared_largest_norm);
}

template <typename Element, int kColumns>
void bound_keys(const BackwardParams& params, const Workspace& workspace) {
  const cudaStream_t stream = stream_of(params.execution);
  const int64_t key_heads = params.visibility.batch * params.heads.num_heads_k;
  if (key_heads == 0) return;
  RRATTN_CUDA_CHECK(
      cudaMemsetAsync(workspace.key_column, 0, key_heads * kColumns * sizeof(uint32_t), stream));
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.value_norm, 0, key_heads * sizeof(uint32_t), stream));
  const dim3 grid(kThreadBlocksPerHead, static_cast<unsigned>(key_heads));
  bound_keys_kernel<Element, kColumns><<<grid, kPrepareThreads, 0, stream>>>(
      params, workspace, aligned_rows(params.key) && aligned_rows(params.value));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::backward
