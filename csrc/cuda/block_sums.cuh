// From the probabilities that a warp holds to sums over key blocks, in registers.
#pragma once

#include "estimate_config.cuh"

namespace rrattn::cuda {

// Sums of one tile: a thread holds, of two rows g and g + 8 (g = lane / 4), the columns 8 c + 2 t +
// {0, 1} (t = lane % 4). R columns make a block. After the exchange every lane of a quad holds
// other sums, which is what it stores.
template <int kStride>
struct BlockSums {
  static constexpr int kColumns = kBlockSize / kStride;            // R
  static constexpr int kBlocks = kTileStrides / kColumns;          // of a tile
  static constexpr int kLanes = kColumns >= 8 ? 4 : kColumns / 2;  // lanes that share a block
  static constexpr int kOwn =
      kColumns >= 8 ? kBlocks : 16;  // blocks a thread has a share of, a row
  static constexpr int kChunksPerBlock = kColumns >= 8 ? kColumns / 8 : 1;  // chunks of 8 columns
  static constexpr int kKept = 2 * kOwn / kLanes;                           // sums a lane keeps

  // shares[row half][own block] -> kept
  __device__ static void exchange(const float (&shares)[2][kOwn], float (&kept)[kKept]) {
    const int t = threadIdx.x % 4;
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) kept[i] = shares[i / kOwn][i % kOwn];
    } else {
      // One lane of a pair keeps row g, the other row g + 8.
      const bool upper = kLanes == 4 ? t >= 2 : t % 2;
      float row[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float mine = upper ? shares[1][i] : shares[0][i],
                    other = upper ? shares[0][i] : shares[1][i];
        row[i] = mine + __shfl_xor_sync(~0u, other, kLanes == 4 ? 2 : 1);
      }
      if constexpr (kLanes == 2) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) kept[i] = row[i];
      } else {
        // Of the two lanes with that row, one keeps the first half of the blocks.
        const bool second = t % 2;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          const float mine = second ? row[kKept + i] : row[i],
                      other = second ? row[i] : row[kKept + i];
          kept[i] = mine + __shfl_xor_sync(~0u, other, 1);
        }
      }
    }
  }

  // Writes to sums[kTileQueries][kBlocks] of the tile; `row` is g's.
  __device__ static void store(const float (&kept)[kKept], int row, float* sums) {
    const int t = threadIdx.x % 4;
    if constexpr (kLanes == 4) {
      float* to = sums + (row + t / 2 * 8) * kBlocks + t % 2 * kKept;
      if constexpr (kKept % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kKept; i += 4) {
          *reinterpret_cast<float4*>(to + i) =
              make_float4(kept[i], kept[i + 1], kept[i + 2], kept[i + 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kKept; ++i) to[i] = kept[i];
      }
    } else if constexpr (kLanes == 2) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) sums[(row + t % 2 * 8) * kBlocks + 2 * i + t / 2] = kept[i];
    } else {
#pragma unroll
      for (int i = 0; i < kKept; ++i)
        sums[(row + i / kOwn * 8) * kBlocks + 4 * (i % kOwn) + t] = kept[i];
    }
  }
};

}  // namespace rrattn::cuda
