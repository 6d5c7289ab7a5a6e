// The sums of a row's exponentials over the key blocks of a tile.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm80::estimate {

template <int kKeyStride>
struct BlockSums {
  static constexpr int kBlockStrides = kBlockSize / kKeyStride;
  // Strides of a sum: those of a block, but no more than a tile has.
  static constexpr int kSumStrides = kBlockStrides < kTileStrides ? kBlockStrides : kTileStrides;
  static constexpr int kTileSums = kTileStrides / kSumStrides;
  static constexpr int kSumsOfBlock = kBlockStrides / kSumStrides;
  static constexpr int kOwnStrides = kSumStrides < kThreadStrides ? kSumStrides : kThreadStrides;
  static constexpr int kOwn = kThreadStrides / kOwnStrides;   // sums of which a thread has strides
  static constexpr int kSharers = kSumStrides / kOwnStrides;  // threads that share a sum

  // Writes a thread's sums to where those of the row and tile lie, [kTileSums].
  __device__ static void store(const float (&own)[kOwn], float* to) {
    const int t = threadIdx.x % 4;
    if constexpr (kSharers > 1) {
      float sum = own[0] + __shfl_xor_sync(~0u, own[0], 1);
      if constexpr (kSharers == 4) sum += __shfl_xor_sync(~0u, sum, 2);
      if (t % kSharers == 0) to[t / kSharers] = sum;
    } else if constexpr (kOwn == 1) {
      to[t] = own[0];
    } else if constexpr (kOwn == 2) {
      reinterpret_cast<float2*>(to)[t] = make_float2(own[0], own[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        *reinterpret_cast<float4*>(to + t * kOwn + i) =
            make_float4(own[i], own[i + 1], own[i + 2], own[i + 3]);
      }
    }
  }
};

}  // namespace rrattn::cuda::sm80::estimate
