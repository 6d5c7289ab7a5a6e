// The kinds of GPU that differ in what tiles fit: by the kilobytes of shared memory that a thread
// block can have.
#pragma once

namespace rrattn::cuda::sm80 {

enum class TileTable {
  k99KB = 99,    // compute capability 8.6, 8.9, 12.0
  k163KB = 163,  // 8.0, 8.7
  k227KB = 227,  // 9.0, 10.0
};

// Of a thread block, in bytes.
constexpr int shared_bytes(TileTable table) {
  return (table == TileTable::k99KB ? 99 : table == TileTable::k163KB ? 163 : 227) * 1024;
}

}  // namespace rrattn::cuda::sm80
