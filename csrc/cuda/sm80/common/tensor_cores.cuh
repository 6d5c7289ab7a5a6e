// What GPUs from Ampere on have for tiles: copies to shared memory that run beside the computation
// (cp.async), loads of fragments (ldmatrix) and products of a warp (mma.sync).
#pragma once

#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "../../common/rows.cuh"

namespace rrattn::cuda::sm80 {

// Of 16 x 16 by 16 x 8 elements. A thread of a quad t in row g = lane / 4 holds, of the result, columns
// 2 t and 2 t + 1 of rows g and g + 8.
template <typename Element>
using WarpMma =
    std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                       cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void store_chunk(uint32_t to, uint4 chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(chunk.x), "r"(chunk.y),
               "r"(chunk.z), "r"(chunk.w)
               : "memory");
}

// Starts to copy 16 bytes to shared memory, zeros unless `valid`.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kPending groups of this thread's copies are there.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices, whose rows the lanes give: those of matrix i lanes 8 i to 8 i + 7.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// A tile in shared memory: rows of 2-byte elements, in panels of 64 columns. Within a panel the 16-byte
// chunks of a row are permuted by its number, so that neither copies nor ldmatrix meet a bank twice. Tiles
// start at multiples of 128 bytes.
constexpr int kPanel = 64;
constexpr int kPanelRowBytes = kPanel * 2;
// Of a tile in shared memory, in bytes. At other places copies take two lines for one: attention was 4 to 12%
// slower with tiles at 16 bytes after a multiple.
constexpr int kTileAlignment = 128;

// Where the element of a row and column lies.
template <int kRows>
__device__ inline uint32_t tile_offset(int row, int column) {
  const int chunk = column % kPanel / 8 ^ row % 8;
  return static_cast<uint32_t>((column / kPanel * kRows + row) * kPanelRowBytes + chunk * 16 +
                               column % 8 * 2);
}

// A lane's place in a tile, and from there the same place `row` rows and `column` columns further on,
// multiples of 8 and of bits that its own column has not: constants, but for one XOR.
class TilePlace {
 public:
  TilePlace() = default;
  template <int kRows>
  __device__ static TilePlace of(uint32_t tile, int row, int column) {
    TilePlace place;
    place.tile_ = tile, place.offset_ = tile_offset<kRows>(row, column);
    // Else the places in other columns are computed ahead of a loop, which has no registers for them.
    asm volatile("" : "+r"(place.offset_));
    return place;
  }
  template <int kRows>
  __device__ uint32_t at(int row, int column) const {
    return tile_ +
           ((offset_ ^ column % kPanel * 2) + (column / kPanel * kRows + row) * kPanelRowBytes);
  }

 private:
  uint32_t tile_, offset_;
};

// Copies of tiles to shared memory by all kThreads threads of a block. Columns from head_dim on are zeros,
// and so are missing rows.
template <int kRows, int kColumns, int kThreads>
class TileCopy {
  static constexpr int kStep = kThreads / 8;  // rows: a panel has 8 chunks of each
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);

 public:
  // Starts to copy a tile of which there are the first `rows` rows. `from`: its first row, and in that the
  // thread's first chunk, as `offset` says. `aligned`: as aligned_rows says; otherwise the tile is there when this returns.
  template <typename Element>
  __device__ static void start(uint32_t to, const Element* from, int64_t row_stride, int rows,
                               int head_dim, bool aligned,
                               int thread = static_cast<int>(threadIdx.x)) {
    const int row = row_of(thread), column = column_of(thread);
    const uint32_t at = to + tile_offset<kRows>(row, column);
    if (aligned && rows >= kRows) {
#pragma unroll
      for (int i = 0; i < kRows; i += kStep, from += kStep * row_stride) {
#pragma unroll
        for (int panel = 0; panel < kColumns; panel += kPanel)
          copy_async(at + tile_offset<kRows>(i, panel), from + panel, column + panel < head_dim);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows; i += kStep, from += kStep * row_stride) {
#pragma unroll 1
      for (int panel = 0; panel < kColumns; panel += kPanel) {
        const bool valid = row + i < rows && column + panel < head_dim;
        const uint32_t chunk = at + tile_offset<kRows>(i, panel);
        if (aligned) {
          copy_async(chunk, from + panel, valid);
        } else {
          store_chunk(chunk,
                      valid ? load_eight(from + panel, 0, 8, false) : make_uint4(0, 0, 0, 0));
        }
      }
    }
  }

  __device__ static int64_t offset(int64_t row_stride, int thread = static_cast<int>(threadIdx.x)) {
    return row_of(thread) * row_stride + column_of(thread);
  }

 private:
  __device__ static int row_of(int thread) { return thread / 8; }
  __device__ static int column_of(int thread) { return thread % 8 * 8; }
};

template <typename Element>
__device__ inline uint32_t pack_two(float first, float second) {
  const Element two[2] = {static_cast<Element>(first), static_cast<Element>(second)};
  return *reinterpret_cast<const uint32_t*>(two);
}

}  // namespace rrattn::cuda::sm80
