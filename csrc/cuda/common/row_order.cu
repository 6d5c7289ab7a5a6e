#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "attend_sections.cuh"
#include "bit_walk.cuh"
#include "block_masking.cuh"
#include "row_order.cuh"

namespace rrattn::cuda {

namespace {

constexpr int64_t kLeastKeyBlocks = 256, kLeastRows = 1024;
// A row is long that has at least this share of the blocks that a multiprocessor attends altogether.
// Long ones are sorted by how many such shares they have, up to kMostShares.
constexpr int kSharesOfAll = 16, kMostShares = 255;

constexpr int kCountThreads = 256, kOrderThreads = 1024;
constexpr int kAtOnce = 8;  // rows that a thread reads at once, since it would wait for each

// A warp counts the blocks of the row at a place of the order by sections. Those that FlashMask hides
// count if the mask has them.
__global__ void __launch_bounds__(kCountThreads)
    count_blocks_kernel(const __grid_constant__ AttendParams params, int num_rows,
                        int section_heads, int* num_blocks) {
  const Visibility& visibility = params.visibility;
  const int place = static_cast<int>(blockIdx.x * kCountThreads + threadIdx.x) / 32;
  if (place >= num_rows) return;
  const MaskRow row = row_of_place(place, visibility, num_rows, section_heads);
  const uint32_t* words = params.block_mask + row.index * visibility.num_mask_words();
  const int count = count_bits(words, end_block(visibility, row.m_block));
  if (threadIdx.x % 32 == 0) num_blocks[place] = count;
}

// A thread block orders all places, of which a thread has some that follow one another.
__global__ void __launch_bounds__(kOrderThreads)
    order_places_kernel(const int* num_blocks, int num_rows, int multiprocessors, int* places) {
  using Sum = cub::BlockReduce<int64_t, kOrderThreads>;
  using Scan = cub::BlockScan<int, kOrderThreads>;
  __shared__ union {
    typename Sum::TempStorage sum;
    typename Scan::TempStorage scan;
  } storage;
  __shared__ float shares_of_block;
  __shared__ int next_of_shares[kMostShares + 1];  // where the next row that is so long goes
  const int thread = static_cast<int>(threadIdx.x);
  const int own_rows = ceil_div(num_rows, kOrderThreads);
  const int first = thread * own_rows, end = min(first + own_rows, num_rows);
  // Calls `use` with each of the thread's places and the blocks of its row.
  const auto for_each_place = [&](const auto& use) {
    for (int place = first; place < end; place += kAtOnce) {
      int blocks[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        blocks[i] = place + i < end ? __ldg(num_blocks + place + i) : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (place + i < end) use(place + i, blocks[i]);
      }
    }
  };
  int64_t all_blocks = 0;
  for_each_place([&](int, int blocks) { all_blocks += blocks; });
  all_blocks = Sum(storage.sum).Sum(all_blocks);
  if (thread == 0) {
    shares_of_block = static_cast<float>(multiprocessors * kSharesOfAll) /
                      static_cast<float>(max(all_blocks, int64_t{1}));
  }
  if (thread <= kMostShares) next_of_shares[thread] = 0;
  __syncthreads();
  const auto shares_of = [&](int blocks) {  // 0: the row is not long
    return min(static_cast<int>(static_cast<float>(blocks) * shares_of_block), kMostShares);
  };
  int not_long = 0;
  for_each_place([&](int, int blocks) {
    const int shares = shares_of(blocks);
    if (shares == 0) {
      ++not_long;
    } else {
      atomicAdd(&next_of_shares[shares], 1);
    }
  });
  __syncthreads();
  const int shares = kMostShares - thread;  // the longest come first
  int before, num_long, next;
  Scan(storage.scan).ExclusiveSum(shares > 0 ? next_of_shares[shares] : 0, before, num_long);
  __syncthreads();
  if (shares > 0) next_of_shares[shares] = before;
  Scan(storage.scan).ExclusiveSum(not_long, next);
  next += num_long;
  __syncthreads();
  for_each_place([&](int place, int blocks) {
    const int shares = shares_of(blocks);
    places[shares == 0 ? next++ : atomicAdd(&next_of_shares[shares], 1)] = place;
  });
}

}  // namespace

RowOrder::RowOrder(Arena& arena, const AttendParams& params) {
  const auto num_rows = static_cast<int>(params.visibility.num_mask_rows());
  if (params.visibility.num_n_blocks() < kLeastKeyBlocks || num_rows < kLeastRows) return;
  places = arena.take<int>(num_rows);
  num_blocks = arena.take<int>(num_rows);
}

void RowOrder::find(const AttendParams& params, int section_heads) const {
  if (places == nullptr) return;
  const cudaStream_t stream = stream_of(params.execution);
  const auto num_rows = static_cast<int>(params.visibility.num_mask_rows());
  const auto grid = static_cast<unsigned>(ceil_div(int64_t{num_rows} * 32, kCountThreads));
  count_blocks_kernel<<<grid, kCountThreads, 0, stream>>>(params, num_rows, section_heads,
                                                          num_blocks);
  RRATTN_CUDA_CHECK(cudaGetLastError());
  order_places_kernel<<<1, kOrderThreads, 0, stream>>>(num_blocks, num_rows, num_multiprocessors(),
                                                       places);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
