// The block mask by key blocks: which query blocks selected each.
#pragma once

#include "workspace.cuh"

namespace rrattn::cuda::backward {

constexpr int kTransposeThreads = 256;

// [B, Hq, Mq, words] -> [B, Hq, Mk, words]; a warp takes 32 query blocks by 32 key blocks.
static __global__ void transpose_mask_kernel(const __grid_constant__ BackwardParams params,
                                             uint32_t* transposed_mask) {
  const Visibility& visibility = params.visibility;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int num_m_words = (num_m_blocks + kMaskWordBits - 1) / kMaskWordBits;
  const int num_n_words = static_cast<int>(visibility.num_mask_words());
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= visibility.batch * visibility.num_heads * num_m_words * num_n_words) return;
  const int n_word = static_cast<int>(warp % num_n_words);
  const int m_word = static_cast<int>(warp / num_n_words % num_m_words);
  const int64_t head = warp / num_n_words / num_m_words;  // of all batch entries
  const int lane = threadIdx.x % 32, m_block = m_word * 32 + lane, n_block = n_word * 32 + lane;
  const uint32_t word =
      m_block < num_m_blocks
          ? params.block_mask[(head * num_m_blocks + m_block) * num_n_words + n_word]
          : 0;
  uint32_t transposed = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t column = __ballot_sync(~0u, word >> bit & 1);
    if (lane == bit) transposed = column;
  }
  if (n_block < num_n_blocks) {
    transposed_mask[(head * num_n_blocks + n_block) * num_m_words + m_word] = transposed;
  }
}

inline void transpose_mask(const BackwardParams& params, const Workspace& workspace) {
  const Visibility& visibility = params.visibility;
  const int64_t warps = visibility.batch * visibility.num_heads *
                        ceil_div(visibility.num_m_blocks(), kMaskWordBits) *
                        visibility.num_mask_words();
  if (warps == 0) return;
  const auto grid = static_cast<unsigned>(ceil_div(warps * 32, kTransposeThreads));
  transpose_mask_kernel<<<grid, kTransposeThreads, 0, stream_of(params.execution)>>>(
      params, workspace.transposed_mask);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::backward
