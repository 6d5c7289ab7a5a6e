// From sums of exponentials to block scores. Three warps of the estimate do this while the
// consumers are at the next item. The last item of a thread block is finished by the consumers
// themselves.
#pragma once

#include "consumer.cuh"

namespace rrattn::cuda::sm90::estimate {

constexpr int kFinisherThreads = kWarpGroup - 32;  // the producer has the first warp of the group

// A team of kThreads threads, with its own ring of chunks in shared memory.
template <typename Traits, int kKeyStride, int kThreads, typename Calls>
class Finisher {
  using Sums = BlockSums<kKeyStride>;
  using Item = WorkItem<Traits::kConsumers>;
  using SharedStorage = typename Traits::SharedStorage;
  // Sampled queries of a query block where these have the stride of the keys.
  static constexpr int kUsualRows = kBlockSize / kKeyStride;
  static constexpr int kTileElements = kTileQueries * Sums::kBlocks;
  static constexpr int kTileBytes = kTileElements * sizeof(float);
  static constexpr int kChunkSlots = 2 * kTileBytes <= Traits::kChunkBytes ? kMaxChunkSlots : 1;
  static constexpr int kChunkTiles = Traits::kChunkBytes / kChunkSlots / kTileBytes;
  static_assert(kChunkTiles > 0);

 public:
  __device__ Finisher(const EstimateParams& params, const Calls& calls,
                      const Workspace<Traits>& workspace, SharedStorage& shared, int thread,
                      int team)
      : params_(params),
        calls_(calls),
        workspace_(workspace),
        shared_(shared),
        thread_(thread),
        team_(team),
        rows_per_block_(kBlockSize / static_cast<int>(params.sampling.stride)),
        // Consumers use the memory of the key tiles, once all of them are done with these.
        chunks_(team == Traits::kConsumers ? shared.chunk
                                           : reinterpret_cast<float*>(shared.key) +
                                                 team * (Traits::kChunkBytes / sizeof(float))) {}

  // Divides by the row sums, adds up the rows of each query block, and writes whole rows of
  // block_scores, for the item's consumers [first, end).
  //
  // The sums come back in chunks of whole tiles, by bulk copies kChunkSlots ahead.
  __device__ void finish(int slot, int first, int end) {
    const Item& item = shared_.item[slot];
    const int consumers = end - first;
    const int num_chunks = (item.num_tiles + kChunkTiles - 1) / kChunkTiles * consumers;
    const auto load = [&](int chunk) {
      if (chunk >= num_chunks) return;
      if (thread_ == 0) {
        const int first_tile = chunk / consumers * kChunkTiles;
        const uint32_t bytes = min(kChunkTiles, item.num_tiles - first_tile) * kTileBytes;
        Barrier& full = shared_.chunk_full[team_][loading_.slot];
        full.arrive_and_expect(bytes);
        SM90_BULK_COPY_G2S::copy(workspace_.sums_of(first + chunk % consumers) +
                                     static_cast<int64_t>(first_tile) * kTileElements,
                                 full.raw(), chunk_in(loading_.slot), bytes);
      }
      loading_.advance();
    };
    for (int chunk = 0; chunk < kChunkSlots; ++chunk) load(chunk);
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const int first_tile = chunk / consumers * kChunkTiles;
      const int consumer = first + chunk % consumers;
      shared_.chunk_full[team_][reading_.slot].wait(reading_.parity);
      if (team_ == Traits::kConsumers && consumer == end - 1) {
        free_sums(position_ + first_tile + kChunkTiles);
      }
      if (item.rows[consumer].active) {
        const auto write = [&](auto num_rows) {
          write_chunk(item, item.rows[consumer], first_tile, chunk_in(reading_.slot),
                      shared_.row_factor[slot][consumer], num_rows);
        };
        if (rows_per_block_ == kUsualRows) {
          write(Int<kUsualRows>{});
        } else {
          write(rows_per_block_);
        }
      }
      cutlass::arch::NamedBarrier::sync(kThreads, team_);  // all have read it
      load(chunk + kChunkSlots);
      reading_.advance();
    }
    for (int consumer = first; consumer < end; ++consumer) {
      if (item.rows[consumer].active) clear_rest(item, item.rows[consumer]);
    }
  }

  // Frees all sums of the item, used or not.
  __device__ void free_item_sums() {
    position_ += kItemPosition;
    free_sums(position_);
  }

 private:
  __device__ float* chunk_in(int slot) const {
    return chunks_ + slot * (kChunkTiles * kTileElements);
  }

  // Lets the consumers overwrite the sums before this position.
  __device__ void free_sums(int64_t position) {
    if (thread_ == 0) shared_.sums_position = position;
  }

  // Row m_block of block_scores.
  __device__ float* scores_of(const Item& item, int head, int m_block) const {
    const EstimateParams& params = calls_.params_of(item, params_);
    const Visibility& visibility = params.visibility;
    return params.block_scores +
           ((calls_.batch_of(item) * visibility.num_heads + head) * visibility.num_m_blocks() +
            m_block) *
               visibility.num_n_blocks();
  }

  // Writes the scores of a chunk. `sums` are those of the tiles from first_tile on; query blocks
  // have `num_rows` of their rows, an int or a constant.
  template <typename NumRows>
  __device__ void write_chunk(const Item& item, const RowTile& rows, int first_tile,
                              const float* sums, const float* row_factor, NumRows num_rows) const {
    constexpr int kVector = Sums::kBlocks < 4 ? Sums::kBlocks : 4;  // key blocks of a thread
    constexpr int kVectors = kChunkTiles * Sums::kBlocks / kVector;
    using Vector =
        std::conditional_t<kVector == 4, float4, std::conditional_t<kVector == 2, float2, float>>;
    const Visibility& visibility = calls_.params_of(item, params_).visibility;
    const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
    const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
    const int first_m_block = rows.first_sample / num_rows;
    for (int i = thread_; i < kTileQueries / num_rows * kVectors; i += kThreads) {
      const int m = i / kVectors, m_block = first_m_block + m;
      const int block = i % kVectors * kVector, tile = first_tile + block / Sums::kBlocks;
      const int n_block = first_tile * Sums::kBlocks + block;
      if (m_block >= num_m_blocks || tile >= item.num_tiles) continue;
      const float* column = sums + block / Sums::kBlocks * kTileElements +
                            m * num_rows * Sums::kBlocks + block % Sums::kBlocks;
      float scores[kVector] = {};
      if (!hides<kTileStrides * kKeyStride>(item, params_, workspace_.tile_bounds, tile)) {
#pragma unroll 8
        for (int step = 0; step < num_rows; ++step) {
          const int r = (step + i) % num_rows;  // neighbouring threads on different banks
          const Vector of_row = *reinterpret_cast<const Vector*>(column + r * Sums::kBlocks);
          const float factor = row_factor[m * num_rows + r];
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            scores[j] += reinterpret_cast<const float*>(&of_row)[j] * factor;
          }
        }
      }
      float* out = scores_of(item, rows.head, m_block);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (n_block + j < num_n_blocks) out[n_block + j] = scores[j];
      }
    }
  }

  // Writes zeros past the last tile.
  __device__ void clear_rest(const Item& item, const RowTile& rows) const {
    const Visibility& visibility = calls_.params_of(item, params_).visibility;
    const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
    for (int m = 0; m < kTileQueries / rows_per_block_; ++m) {
      const int m_block = rows.first_sample / rows_per_block_ + m;
      if (m_block >= visibility.num_m_blocks()) break;
      float* out = scores_of(item, rows.head, m_block);
      for (int n_block = item.num_tiles * Sums::kBlocks + thread_; n_block < num_n_blocks;
           n_block += kThreads) {
        out[n_block] = 0;
      }
    }
  }

  const EstimateParams& params_;
  const Calls& calls_;
  const Workspace<Traits>& workspace_;
  SharedStorage& shared_;
  const int thread_;
  const int team_;            // number of a consumer; kConsumers: the three warps
  const int rows_per_block_;  // sampled queries of a query block
  float* chunks_;
  RingPosition<kChunkSlots> loading_, reading_;
  int64_t position_ = 0;
};

}  // namespace rrattn::cuda::sm90::estimate
