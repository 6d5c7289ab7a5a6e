// Block scores on Hopper, in two kernels.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D]  ->  block_scores [B, Hq, Mq, Mk] float32
//
// pool_keys_kernel averages the keys of each stride and writes them in the very order in which the
// tensor cores want them in shared memory, so that a tile of 128 strides is one contiguous bulk
// copy.
//
// estimate_kernel is persistent. A work item is up to kConsumers row tiles of 64 sampled queries
// that share a key head, one for each consumer warp group; one producer thread streams the tiles of
// pooled keys past them. A consumer computes S = Q K^T of a tile (wgmma), takes 2^(S - reference)
// and sums it over the strides of each key block. The reference of a row is its maximum over the
// first tile in which it sees anything: later tiles need no maximum and no rescaling, because a
// float's exponent has room for scores 2^100 times the reference. A row that outgrows even that
// makes the item start over with the exact maximum, found by one extra pass.
//
// The softmax's denominator is known only after the last tile, and it differs from row to row, so
// the sums wait in a scratch row (in the L2 cache for up to 32K tokens or so) until it is. That is
// 4 bytes for every 16 scores (stride 8), where the alternative is to compute every score twice.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "block_sums.cuh"
#include "pool_keys.cuh"

namespace rrattn::cuda {

// The last stride that a token sees, plus 1.
template <int kStride>
__device__ inline int visible_strides(const Visibility& visibility, const EstimateLayout& layout,
                                      int token) {
  if (!visibility.causal) return layout.num_strides;
  return min((token + static_cast<int>(visibility.shift())) / kStride + 1, layout.num_strides);
}

// The 64 sampled queries of one consumer in one item.
template <int kStride>
struct RowTile {
  bool active;
  int head;  // query head
  int first_sample;
  int first_token, last_token;
  int num_tiles;  // of strides that any of them sees

  // Items count the key heads first, then from the last row tiles, the longest, to the first. Row
  // tiles of a key head are in the order of their rows, then of their heads.
  __device__ RowTile(const EstimateParams& params, const EstimateLayout& layout, int item,
                     int consumers, int consumer) {
    const Visibility& visibility = params.visibility;
    const int seqlen_q = static_cast<int>(visibility.seqlen_q);
    const int key_head = item % layout.key_heads % static_cast<int>(params.heads.num_heads_k);
    const int from_end = item / layout.key_heads * consumers + consumer;
    const int index = layout.num_row_tiles * layout.group - 1 - from_end;
    active = index >= 0;
    head = key_head * layout.group + index % layout.group;
    first_sample = index / layout.group * kTileQueries;
    const int phase = static_cast<int>((params.head_offset + head) % kStride);
    first_token = first_sample * kStride + phase;
    last_token =
        min(first_sample + kTileQueries - 1, (seqlen_q - 1 - phase) / kStride) * kStride + phase;
    const bool empty = !active || first_token >= seqlen_q;
    num_tiles =
        empty ? 0
              : (visible_strides<kStride>(visibility, layout, last_token) + kTileStrides - 1) /
                    kTileStrides;
  }
};

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

enum class Pass { kFirstTileReference, kMaximum, kMaximumReference };

constexpr float kOutgrown = 0x1p100f;  // a row sum from here on asks for the exact maximum

template <typename Traits, int kStride>
class EstimateConsumer {
  using Sums = BlockSums<kStride>;
  using SharedStorage = typename Traits::SharedStorage;

 public:
  __device__ EstimateConsumer(const EstimateParams& params, const EstimateLayout& layout,
                              const EstimateWorkspace<Traits>& workspace, SharedStorage& shared)
      : params_(params),
        layout_(layout),
        shared_(shared),
        consumer_(threadIdx.x / kWarpGroup - 1),
        thread_(threadIdx.x % kWarpGroup),
        row_(thread_ / 32 * 16 + thread_ % 32 / 4) {
    block_sums_ =
        workspace.block_sums + (static_cast<int64_t>(blockIdx.x) * Traits::kConsumers + consumer_) *
                                   layout_.num_tiles * kTileQueries * Sums::kBlocks;
    score_scale_ = params.softmax_scale * 1.44269504088896340736f;  // scores in units of log2
  }

  __device__ void begin_item(const RowTile<kStride>& rows, int64_t batch,
                             const EstimateWorkspace<Traits>& workspace, bool aligned) {
    using Element = typename Traits::Element;
    const Visibility& visibility = params_.visibility;
    stride_bounds_ = run_bounds_of(visibility, kStride, workspace.stride_bounds, batch, rows.head);
    tile_bounds_ =
        run_bounds_of(visibility, kStride * kTileStrides, workspace.tile_bounds, batch, rows.head);
    if (!rows.active) return;
    for (int half = 0; half < 2; ++half) {
      token_[half] = rows.first_token + (row_ + half * 8) * kStride;
      limit_[half] = token_[half] < visibility.seqlen_q
                         ? visible_strides<kStride>(visibility, layout_, token_[half])
                         : 0;
      reference_[half] = -INFINITY;
    }
    warp_limit_ = __reduce_min_sync(~0u, min(limit_[0], limit_[1]));

    constexpr int kChunks = Traits::kHeadDim / 8;
    const auto* queries = static_cast<const Element*>(params_.query.data) +
                          batch * params_.query.batch_stride +
                          rows.head * params_.query.head_stride;
    for (int i = thread_; i < kTileQueries * kChunks; i += kWarpGroup) {
      const int64_t token = rows.first_token + i / kChunks * kStride;
      const int column = i % kChunks * 8;
      uint4 eight = make_uint4(0, 0, 0, 0);
      if (token < visibility.seqlen_q) {
        eight = load_eight(queries + token * params_.query.row_stride, column,
                           static_cast<int>(params_.heads.head_dim), aligned);
      }
      *reinterpret_cast<uint4*>(shared_.query[consumer_] +
                                typename Traits::QueryOffsets{}(i / kChunks, column)) = eight;
    }
    cutlass::arch::fence_view_async_shared();  // wgmma reads what these stores wrote
    sync_warp_group();
  }

  __device__ void begin_pass() { row_sum_[0] = row_sum_[1] = 0; }

  __device__ bool sees(const RowTile<kStride>& rows, int tile) const {
    return tile < rows.num_tiles && (tile_bounds_ == nullptr ||
                                     !tile_bounds_[tile].hides(rows.first_token, rows.last_token));
  }

  __device__ void process_tile(const RowTile<kStride>& rows, int tile, int stage, Pass pass) {
    typename Traits::Mma mma;
    auto thread_mma = mma.get_thread_slice(thread_);
    auto query =
        make_tensor(make_smem_ptr(shared_.query[consumer_]), typename Traits::QueryLayout{});
    auto key = make_tensor(make_smem_ptr(shared_.key[stage]), typename Traits::KeyLayout{});
    auto query_fragment = thread_mma.partition_fragment_A(query);
    auto key_fragment = thread_mma.partition_fragment_B(key);
    auto scores = partition_fragment_C(mma, Shape<Int<kTileQueries>, Int<kTileStrides>>{});
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(query_fragment); ++k) {
      cute::gemm(mma, query_fragment(_, _, k), key_fragment(_, _, k), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    release(stage);

    // Element (e, half, c): row row_ + 8 half, column 8 c + 2 t + e.
    const auto at = [&](int half, int c, int e) -> float& { return scores(c * 4 + half * 2 + e); };
    const int first_stride = tile * kTileStrides;
    if (first_stride + kTileStrides > warp_limit_) hide_past_limit(at, first_stride);
    if (tile_bounds_ != nullptr && tile_bounds_[tile].meets(rows.first_token, rows.last_token)) {
      hide_by_bounds(at, first_stride);
    }
    const bool unset = reference_[0] == -INFINITY || reference_[1] == -INFINITY;
    if (pass == Pass::kMaximum || (pass == Pass::kFirstTileReference && __any_sync(~0u, unset))) {
      raise_reference(at, pass == Pass::kMaximum);
    }
    if (pass == Pass::kMaximum) return;

    float shares[2][Sums::kOwn];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float minus_reference = reference_[half] == -INFINITY ? 0.f : -reference_[half];
#pragma unroll
      for (int block = 0; block < Sums::kOwn; ++block) {
        float sum;
#pragma unroll
        for (int i = 0; i < Sums::kChunksPerBlock; ++i) {
          const int c = block * Sums::kChunksPerBlock + i;
          const float pair = exp2_approx(fmaf(at(half, c, 0), score_scale_, minus_reference)) +
                             exp2_approx(fmaf(at(half, c, 1), score_scale_, minus_reference));
          sum = i == 0 ? pair : sum + pair;
        }
        shares[half][block] = sum;
        row_sum_[half] += sum;
      }
    }
    float kept[Sums::kKept];
    Sums::exchange(shares, kept);
    Sums::store(kept, row_, tile_sums(tile));
  }

  // A tile that none of the rows sees.
  __device__ void clear_tile(int tile) {
    for (int i = thread_; i < kTileQueries * Sums::kBlocks; i += kWarpGroup) tile_sums(tile)[i] = 0;
  }

  __device__ void release(int stage) {
    if (thread_ % 32 == 0) shared_.empty_barriers[stage].arrive();
  }

  __device__ bool end_pass() {
    row_sum_[0] = quad_sum(row_sum_[0]);
    row_sum_[1] = quad_sum(row_sum_[1]);
    return row_sum_[0] >= kOutgrown || row_sum_[1] >= kOutgrown;
  }

  // Divides by the row sums, adds up the rows of each query block, and writes whole rows of
  // block_scores.
  __device__ void write_scores(const RowTile<kStride>& rows, int64_t batch) {
    const Visibility& visibility = params_.visibility;
    float* row_factor = shared_.row_factor[consumer_];
    if (thread_ % 4 == 0) {
      for (int half = 0; half < 2; ++half) {
        row_factor[row_ + half * 8] = row_sum_[half] == 0 ? 0 : 1 / row_sum_[half];
      }
    }
    sync_warp_group();                           // also: every thread's sums are in memory
    constexpr int kRows = kBlockSize / kStride;  // sampled queries of a query block
    const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
    const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
    const int end_block = min(rows.num_tiles * Sums::kBlocks, num_n_blocks);
    for (int m = 0; m < kTileQueries / kRows; ++m) {
      const int m_block = rows.first_sample / kRows + m;
      if (m_block >= num_m_blocks) break;
      float* out =
          params_.block_scores +
          ((batch * visibility.num_heads + rows.head) * num_m_blocks + m_block) * num_n_blocks;
      const float* sums = block_sums_ + m * kRows * Sums::kBlocks;
      for (int n_block = thread_; n_block < num_n_blocks; n_block += kWarpGroup) {
        float score = 0;
        if (n_block < end_block) {
          const float* column =
              sums +
              static_cast<int64_t>(n_block / Sums::kBlocks) * (kTileQueries * Sums::kBlocks) +
              n_block % Sums::kBlocks;
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            score += column[r * Sums::kBlocks] * row_factor[m * kRows + r];
        }
        out[n_block] = score;
      }
    }
  }

 private:
  __device__ float* tile_sums(int tile) const {
    return block_sums_ + static_cast<int64_t>(tile) * (kTileQueries * Sums::kBlocks);
  }

  __device__ void sync_warp_group() const {
    cutlass::arch::NamedBarrier::sync(kWarpGroup, consumer_);
  }

  template <typename At>
  __device__ void hide_past_limit(const At& at, int first_stride) {
#pragma unroll
    for (int c = 0; c < kTileStrides / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int stride = first_stride + 8 * c + 2 * (thread_ % 4) + e;
        if (stride >= limit_[0]) at(0, c, e) = -INFINITY * sign();
        if (stride >= limit_[1]) at(1, c, e) = -INFINITY * sign();
      }
    }
  }

  template <typename At>
  __device__ void hide_by_bounds(const At& at, int first_stride) {
#pragma unroll
    for (int c = 0; c < kTileStrides / 8; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int stride = first_stride + 8 * c + 2 * (thread_ % 4) + e;
        if (stride >= layout_.num_strides) continue;
        const RunBounds& bounds = stride_bounds_[stride];
        if (bounds.hides(token_[0], token_[0])) at(0, c, e) = -INFINITY * sign();
        if (bounds.hides(token_[1], token_[1])) at(1, c, e) = -INFINITY * sign();
      }
    }
  }

  // The largest score of each row so far, or only where there is none yet.
  template <typename At>
  __device__ void raise_reference(const At& at, bool always) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int c = 0; c < kTileStrides / 8; ++c) {
        largest =
            fmaxf(largest, fmaxf(at(half, c, 0) * score_scale_, at(half, c, 1) * score_scale_));
      }
      largest = quad_max(largest);
      if (always || reference_[half] == -INFINITY)
        reference_[half] = fmaxf(reference_[half], largest);
    }
  }

  // Hidden scores are -infinity after they are scaled.
  __device__ float sign() const { return score_scale_ < 0 ? -1.f : 1.f; }

  const EstimateParams& params_;
  const EstimateLayout& layout_;
  SharedStorage& shared_;
  const int consumer_, thread_;
  const int row_;  // of the thread's first row in the row tile
  float* block_sums_;
  float score_scale_;
  const RunBounds *stride_bounds_, *tile_bounds_;
  int token_[2];
  int limit_[2];  // strides that the row may see under the diagonal and the sequence end
  int warp_limit_;
  float reference_[2], row_sum_[2];
};

template <typename Traits, int kStride>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    estimate_kernel(const __grid_constant__ EstimateParams params,
                    const __grid_constant__ EstimateLayout layout,
                    const __grid_constant__ EstimateWorkspace<Traits> workspace, int num_items,
                    bool aligned) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = threadIdx.x / kWarpGroup;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.full_barriers[stage].init(1);  // the producer, with the bytes of the copy
      shared.empty_barriers[stage].init(Traits::kConsumers * 4);  // a lane of every consumer warp
    }
    cutlass::arch::fence_barrier_init();
  }

  // The next item, for all threads; < 0: none is left. Both roles walk the same items, passes and
  // tiles.
  const auto next_item = [&]() -> int {
    __syncthreads();  // the last item is done with, and the barriers are there
    if (threadIdx.x == 0) {
      shared.item = atomicAdd(workspace.next_item, 1);
      shared.restart = 0;
    }
    __syncthreads();
    return shared.item < num_items ? shared.item : -1;
  };
  const auto num_tiles_of = [&](int item) {
    int num_tiles = 0;
    for (int c = 0; c < Traits::kConsumers; ++c) {
      num_tiles =
          max(num_tiles, RowTile<kStride>(params, layout, item, Traits::kConsumers, c).num_tiles);
    }
    return num_tiles;
  };
  // After a first pass that some row outgrew: the maximum, then the sums again.
  const auto next_pass = [&](Pass pass) {
    __syncthreads();
    if (pass == Pass::kFirstTileReference && shared.restart) return Pass::kMaximum;
    return pass == Pass::kMaximum ? Pass::kMaximumReference : Pass::kFirstTileReference;
  };

  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == Traits::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    for (int item = next_item(); item >= 0; item = next_item()) {
      const int num_tiles = num_tiles_of(item);
      const auto* keys = workspace.pooled_keys + static_cast<int64_t>(item % layout.key_heads) *
                                                     layout.num_tiles * Traits::kKeyTileElements;
      Pass pass = Pass::kFirstTileReference;
      do {
        if (threadIdx.x == 0) {
          for (int tile = 0; tile < num_tiles; ++tile, advance()) {
            shared.empty_barriers[stage].wait(phase ^
                                              1);  // until all consumers have read the stage
            shared.full_barriers[stage].arrive_and_expect_tx(Traits::kKeyTileBytes);
            SM90_BULK_COPY_G2S::copy(keys + static_cast<int64_t>(tile) * Traits::kKeyTileElements,
                                     reinterpret_cast<uint64_t*>(&shared.full_barriers[stage]),
                                     shared.key[stage], Traits::kKeyTileBytes);
          }
        }
        pass = next_pass(pass);
      } while (pass != Pass::kFirstTileReference);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    EstimateConsumer<Traits, kStride> consumer(params, layout, workspace, shared);
    for (int item = next_item(); item >= 0; item = next_item()) {
      const int num_tiles = num_tiles_of(item);
      const int64_t batch = item % layout.key_heads / params.heads.num_heads_k;
      const RowTile<kStride> rows(params, layout, item, Traits::kConsumers, warp_group - 1);
      consumer.begin_item(rows, batch, workspace, aligned);
      Pass pass = Pass::kFirstTileReference;
      do {
        consumer.begin_pass();
        for (int tile = 0; tile < num_tiles; ++tile, advance()) {
          shared.full_barriers[stage].wait(phase);  // until the tile's bytes have arrived
          if (consumer.sees(rows, tile)) {
            consumer.process_tile(rows, tile, stage, pass);
          } else {
            consumer.release(stage);
            if (tile < rows.num_tiles) consumer.clear_tile(tile);
          }
        }
        if (consumer.end_pass() && pass == Pass::kFirstTileReference) shared.restart = 1;
        pass = next_pass(pass);
      } while (pass != Pass::kFirstTileReference);
      if (rows.active) consumer.write_scores(rows, batch);
    }
  }
}

template <typename Traits, int kStride>
void launch_estimate(const EstimateParams& params) {
  const auto stream = static_cast<cudaStream_t>(params.execution.stream);
  const Visibility& visibility = params.visibility;
  const EstimateLayout layout(params);
  const int multiprocessors = num_multiprocessors();
  Arena arena(params.execution.workspace);
  const EstimateWorkspace<Traits> workspace(arena, params, multiprocessors);
  compute_run_bounds(visibility, kStride, workspace.stride_bounds, stream);
  compute_run_bounds(visibility, kStride * kTileStrides, workspace.tile_bounds, stream);

  const dim3 pool_grid(static_cast<unsigned>(layout.num_tiles * kTileStrides / kPoolStrides),
                       static_cast<unsigned>(params.heads.num_heads_k),
                       static_cast<unsigned>(visibility.batch));
  pool_keys_kernel<Traits, kStride>
      <<<pool_grid, kPoolThreads, 0, stream>>>(params, layout, workspace, aligned_rows(params.key));
  RRATTN_CUDA_CHECK(cudaGetLastError());

  const int num_items =
      layout.key_heads *
      static_cast<int>(ceil_div(layout.num_row_tiles * layout.group, Traits::kConsumers));
  const int grid = std::min(num_items, multiprocessors);
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  const auto kernel = estimate_kernel<Traits, kStride>;
  RRATTN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<grid, Traits::kThreads, kSharedBytes, stream>>>(params, layout, workspace, num_items,
                                                           aligned_rows(params.query));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
