// How the strides of a tile lie in the tensor cores' accumulators, and the sums over key blocks.
//
// A thread of a wgmma holds, of rows g and g + 8 (g = lane / 4), the columns 8 c + 2 t + {0, 1}
// (t = lane % 4, c < 16). The pooled keys are put in such an order that these are the 32 strides
// from 32 t on. So whole key blocks fall to one thread, and their sums need no exchange.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::estimate {

constexpr int kThreadStrides = kTileStrides / 4;  // of a row, in one thread

// Where a stride of the tile lies: the row of the key tile, which is the column of the scores.
__host__ __device__ constexpr int column_of(int stride) {
  const int t = stride / kThreadStrides, i = stride % kThreadStrides;
  return i / 2 * 8 + t * 2 + i % 2;
}

// A tile of pooled keys, as KeyLayout wants it in shared memory.
template <typename Traits>
struct KeyTile {
  using Element = typename Traits::Element;
  using Offsets = decltype(as_position_independent_swizzle_layout(typename Traits::KeyLayout{}));
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kStrides = kTileStrides;
  static constexpr int kElements = Traits::kKeyTileElements;
  static constexpr int kVariances = kTileVariances;

  __device__ static int key_offset(int stride, int column) {
    return Offsets{}(column_of(stride), column);
  }
  __device__ static int variance_offset(int stride) {
    return stride / kThreadStrides * kThreadVariances + stride % kThreadStrides;
  }
};

template <int kKeyStride>
struct BlockSums {
  static constexpr int kBlockStrides = kBlockSize / kKeyStride;
  static constexpr int kBlocks = kTileStrides / kBlockStrides;  // of a tile
  static constexpr int kOwnStrides =
      kBlockStrides < kThreadStrides ? kBlockStrides : kThreadStrides;
  static constexpr int kOwn = kThreadStrides / kOwnStrides;  // blocks of which a thread has strides
  static constexpr int kSharers = kBlockStrides / kOwnStrides;  // threads that share a block

  // Where a thread writes in sums[kTileQueries][kBlocks] of a tile; `row` is g's.
  __device__ static int offset(int row) {
    const int t = threadIdx.x % 4;
    return row * kBlocks + (kSharers > 1 ? t / kSharers : t * kOwn);
  }

  // Writes own[row half][block] there.
  __device__ static void store(const float (&own)[2][kOwn], float* to) {
#pragma unroll
    for (int half = 0; half < 2; ++half, to += 8 * kBlocks) {
      if constexpr (kSharers > 1) {
        float sum = own[half][0] + __shfl_xor_sync(~0u, own[half][0], 1);
        if constexpr (kSharers == 4) sum += __shfl_xor_sync(~0u, sum, 2);
        if (threadIdx.x % kSharers == half) *to = sum;
      } else if constexpr (kOwn == 1) {
        *to = own[half][0];
      } else if constexpr (kOwn == 2) {
        *reinterpret_cast<float2*>(to) = make_float2(own[half][0], own[half][1]);
      } else {
#pragma unroll
        for (int i = 0; i < kOwn; i += 4) {
          *reinterpret_cast<float4*>(to + i) =
              make_float4(own[half][i], own[half][i + 1], own[half][i + 2], own[half][i + 3]);
        }
      }
    }
  }
};

}  // namespace rrattn::cuda::sm90::estimate
