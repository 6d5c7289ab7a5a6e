#include "block_means.cuh"
#include "element.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace rrattn::cuda {

namespace {

constexpr int kThreads = 256;

// A thread's sum of 8 columns of rows `kStep` apart. All of its loads, up to 8, are in flight.
template <int kRows, int kStep, typename Element>
__device__ void sum_rows(const Element* rows, int64_t row_stride, int first_row, int num_rows,
                         int column, int head_dim, bool aligned, float (&sum)[8]) {
  constexpr int kLoads = kRows < 8 ? kRows : 8;
#pragma unroll 1
  for (int r0 = 0; r0 < kRows; r0 += kLoads) {
    uint4 eights[kLoads];
#pragma unroll
    for (int r = 0; r < kLoads; ++r) {
      const int row = first_row + (r0 + r) * kStep;
      eights[r] = row < num_rows ? load_eight(rows + row * row_stride, column, head_dim, aligned)
                                 : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < kLoads; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += element<Element>(eights[r], e);
    }
  }
}

// A thread block has one key block of one head. Threads side by side read the columns of a row, of
// which keys and values have up to kColumns.
template <typename Element, int kColumns>
__global__ void __launch_bounds__(kThreads)
    block_means_kernel(AttendParams params, Rows mean_key, Rows mean_value, bool aligned_key,
                       bool aligned_value) {
  static_assert(kColumns <= kThreads);  // at the end, a thread has a column
  constexpr int kChunks = kColumns / 8;
  constexpr int kRowGroups = kThreads / kChunks;
  __shared__ alignas(16) float sums[2][kRowGroups][kColumns];  // of keys, of values
  const int64_t n_block = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int64_t first_key = n_block * kBlockSize;
  const int num_keys =
      static_cast<int>(min(params.visibility.seqlen_k - first_key, int64_t{kBlockSize}));
  const int head_dim = static_cast<int>(params.heads.head_dim);
  const int head_dim_v = static_cast<int>(params.heads.head_dim_v);
  const int row_group = static_cast<int>(threadIdx.x) / kChunks;
  const int first_column = static_cast<int>(threadIdx.x) % kChunks * 8;
  const auto sum = [&](const Rows& rows, int num_columns, bool aligned,
                       float (&to)[kRowGroups][kColumns]) {
    float eight[8] = {};
    sum_rows<kBlockSize / kRowGroups, kRowGroups>(
        static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
            first_key * rows.row_stride + head * rows.head_stride,
        rows.row_stride, row_group, num_keys, first_column, num_columns, aligned, eight);
    auto* fours = reinterpret_cast<float4*>(&to[row_group][first_column]);
    fours[0] = make_float4(eight[0], eight[1], eight[2], eight[3]);
    fours[1] = make_float4(eight[4], eight[5], eight[6], eight[7]);
  };
  sum(params.key, head_dim, aligned_key, sums[0]);
  sum(params.value, head_dim_v, aligned_value, sums[1]);
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  const auto mean_of = [&](const float (&parts)[kRowGroups][kColumns]) {
    float total = 0;
    for (int g = 0; column < kColumns && g < kRowGroups; ++g) total += parts[g][column];
    return static_cast<Element>(total / static_cast<float>(num_keys));
  };
  Element key = mean_of(sums[0]), value = mean_of(sums[1]);
  if (__syncthreads_or(!isfinite(static_cast<float>(value)))) {
    key = static_cast<Element>(NAN);
    value = static_cast<Element>(0.f);
  }
  const auto write = [&](const Rows& to, Element mean) {
    static_cast<Element*>(to.data)[batch * to.batch_stride + n_block * to.row_stride +
                                   head * to.head_stride + column] = mean;
  };
  if (column < head_dim) write(mean_key, key);
  if (column < head_dim_v) write(mean_value, value);
}

}  // namespace

template <typename Element, int kColumns>
void launch_block_means(const AttendParams& params, const Rows& mean_key, const Rows& mean_value,
                        cudaStream_t stream) {
  const Visibility& visibility = params.visibility;
  if (visibility.seqlen_k == 0) return;
  const dim3 grid(static_cast<unsigned>(visibility.num_n_blocks()),
                  static_cast<unsigned>(params.heads.num_heads_k),
                  static_cast<unsigned>(visibility.batch));
  block_means_kernel<Element, kColumns><<<grid, kThreads, 0, stream>>>(
      params, mean_key, mean_value, aligned_rows(params.key), aligned_rows(params.value));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

#define RRATTN_INSTANTIATE_BLOCK_MEANS(kColumns)                              \
  template void launch_block_means<ElementOf<DataType::kBFloat16>, kColumns>( \
      const AttendParams&, const Rows&, const Rows&, cudaStream_t);           \
  template void launch_block_means<ElementOf<DataType::kFloat16>, kColumns>(  \
      const AttendParams&, const Rows&, const Rows&, cudaStream_t)
RRATTN_INSTANTIATE_BLOCK_MEANS(64);
RRATTN_INSTANTIATE_BLOCK_MEANS(128);
RRATTN_INSTANTIATE_BLOCK_MEANS(256);

}  // namespace rrattn::cuda
