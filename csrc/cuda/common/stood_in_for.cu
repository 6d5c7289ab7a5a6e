#include "launch.cuh"
#include "stood_in_for.cuh"

namespace rrattn::cuda {

namespace {

constexpr int kThreads = 256;

// A warp has a row of the block mask, a lane a block of each word.
__global__ void __launch_bounds__(kThreads)
    stood_in_for_kernel(AttendParams params, const SpanBounds* block_bounds, uint32_t* words) {
  const Visibility& visibility = params.visibility;
  const int lane = threadIdx.x % 32;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t m_block = row % visibility.num_m_blocks(), head = row / visibility.num_m_blocks();
  if (head >= visibility.batch * visibility.num_heads) return;
  const SpanBounds* bounds =
      span_bounds_of(visibility, kBlockSize, block_bounds, head / visibility.num_heads,
                     head % visibility.num_heads);
  const uint32_t* mask_row = params.block_mask + row * visibility.num_mask_words();
  uint32_t* to = words + row * visibility.num_mask_words();
  for (int64_t word = 0; word < visibility.num_mask_words(); ++word) {
    const uint32_t bits = __ballot_sync(
        ~0u, stood_in_for(visibility, bounds, mask_row, m_block, word * kMaskWordBits + lane));
    if (lane == 0) to[word] = bits;
  }
}

}  // namespace

void find_stood_in_for(const AttendParams& params, const SpanBounds* block_bounds, uint32_t* words,
                       cudaStream_t stream) {
  const Visibility& visibility = params.visibility;
  const int64_t rows = visibility.num_mask_rows();
  const auto thread_blocks = static_cast<unsigned>(ceil_div(rows * 32, kThreads));
  stood_in_for_kernel<<<thread_blocks, kThreads, 0, stream>>>(params, block_bounds, words);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
