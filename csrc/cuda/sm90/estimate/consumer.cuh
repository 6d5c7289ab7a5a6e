// A consumer warp group of the estimate: the scores of its 64 sampled queries against tiles of 128
// pooled keys, their exponentials, and the sums of these over key blocks.
#pragma once

#include "../../common/rows.cuh"
#include "block_sums.cuh"

namespace rrattn::cuda::sm90::estimate {

constexpr float kOutgrown = 0x1p100f;  // a row sum from here on asks for the exact maximum

// All items of a thread block put their sums into the same memory: those of a tile may be written
// once those of the same tile of the item before have been read back. A position counts items from
// bit 32 on, and tiles below it.
constexpr int64_t kItemPosition = int64_t{1} << 32;

// Calls: UsualCall, or RaggedRequests.
template <typename Traits, int kKeyStride, typename Calls>
class Consumer {
  using Sums = BlockSums<kKeyStride>;
  using SharedStorage = typename Traits::SharedStorage;
  using Scores = decltype(partition_fragment_C(typename Traits::Mma{},
                                               Shape<Int<kTileQueries>, Int<kTileStrides>>{}));

 public:
  __device__ Consumer(const EstimateParams& params, const WorkLayout& layout, const Calls& calls,
                      const Workspace<Traits>& workspace, SharedStorage& shared, int consumer)
      : params_(params),
        layout_(layout),
        calls_(calls),
        workspace_(workspace),
        shared_(shared),
        consumer_(consumer) {
    block_sums_ = workspace.sums_of(consumer) + Sums::offset(row());
  }

  // Takes the item in a slot, and copies its queries to shared memory.
  __device__ void begin_item(int slot, bool aligned) {
    slot_ = slot;
    reference_[0] = reference_[1] = -INFINITY;
    warp_limit_ = __reduce_min_sync(~0u, min(row_limit(0), row_limit(1)));

    using Element = typename Traits::Element;
    constexpr int kChunks = Traits::kHeadDim / 8;
    const RowTile& rows = this->rows();
    const int stride = static_cast<int>(params_.sampling.stride);
    const EstimateParams& params = calls_.params_of(shared_.item[slot], params_);
    const auto* queries = static_cast<const Element*>(params.query.data) +
                          calls_.batch_of(shared_.item[slot]) * params_.query.batch_stride +
                          rows.head * params_.query.head_stride;
    for (int i = threadIdx.x % kWarpGroup; i < kTileQueries * kChunks; i += kWarpGroup) {
      const int64_t token = rows.first_token + i / kChunks * stride;
      const int column = i % kChunks * 8;
      uint4 eight = make_uint4(0, 0, 0, 0);
      if (rows.active && token < params.visibility.seqlen_q) {
        eight = load_eight(queries + token * params_.query.row_stride, column,
                           static_cast<int>(params_.heads.head_dim), aligned);
      }
      *reinterpret_cast<uint4*>(shared_.query[consumer_] +
                                typename Traits::QueryOffsets{}(i / kChunks, column)) = eight;
      if (params_.sampling.spread > 0) {
        const float square = row_sum<kChunks>(square_of<Element>(eight));
        if (i % kChunks == 0) {
          shared_.row_factor[slot][consumer_][i / kChunks] = layout_.variance_weight * square;
        }
      }
    }
    fence_async_proxy_shared();  // wgmma reads what these stores wrote
    cutlass::arch::NamedBarrier::sync(kWarpGroup, consumer_);
  }

  // Goes through all tiles of the item; with `maximum`, only to find the exact maximum.
  __device__ void take_pass(bool maximum) {
    row_sum_[0] = row_sum_[1] = 0;
    for (;;) {
      Scores scores;
      const int tile = multiply(scores);
      if (tile < 0) break;
      process_tile(scores, tile, maximum);
    }
    row_sum_[0] = quad_sum(row_sum_[0]);
    row_sum_[1] = quad_sum(row_sum_[1]);
  }

  // Hands the item to the finisher.
  __device__ void end_item() {
    __syncwarp();  // until all of the warp have read their rows' factors of variances
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_sum_[half] + sink_term(half);
        shared_.row_factor[slot_][consumer_][row() + half * 8] = sum == 0 ? 0 : 1 / sum;
      }
    }
    if (row_sum_[0] >= kOutgrown || row_sum_[1] >= kOutgrown) shared_.outgrown[slot_] = true;
    fence_async_proxy();  // bulk copies read the sums that this thread wrote
    shared_.sums_full[slot_].arrive();
    position_ += kItemPosition;
  }

 private:
  // Computes the scores of the next slot, and returns its tile. It computes them even if the slot
  // holds no tile: that is known only when the product is well under way.
  __device__ int multiply(Scores& scores) {
    typename Traits::Mma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    auto query = thread_mma.partition_fragment_A(
        make_tensor(make_smem_ptr(shared_.query[consumer_]), typename Traits::QueryLayout{}));
    auto key = thread_mma.partition_fragment_B(
        make_tensor(make_smem_ptr(shared_.key[keys_.slot]), typename Traits::KeyLayout{}));
    shared_.key_full[keys_.slot].wait(keys_.parity);
    start_product<GMMA::ScaleOut::Zero>(mma, query, key, scores);
    const int tile = shared_.tile[keys_.slot];
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    if (params_.sampling.spread > 0) add_spread(scores);
    __syncwarp();  // all of the warp have read the tile's number and variances
    if (threadIdx.x % 32 == 0) shared_.key_empty[keys_.slot].arrive();
    keys_.advance();
    return tile;
  }

  // What the sink adds to the sum of a row, a stride of keys counting as one. Where it is infinite,
  // scores are too small for a float.
  __device__ float sink_term(int half) const {
    if (params_.sink == nullptr || !rows().active) return 0;
    const float reference = reference_[half] == -INFINITY ? 0 : reference_[half];
    const float sink = params_.sink[rows().head] * kLog2E;
    return exp2_approx(sink - log2f(static_cast<float>(kKeyStride)) - reference);
  }

  // Writes the sums of exponentials over key blocks to memory; with `maximum`, only finds the
  // maximum.
  __device__ void process_tile(Scores& scores, int tile, bool maximum) {
    // Stride i of the thread's 32, of row row() + 8 half.
    const auto at = [&](int half, int i) -> float& { return scores(accumulator_index(half, i)); };
    const bool flashmask = params_.visibility.row_bounds.data != nullptr;
    if ((tile + 1) * kTileStrides > warp_limit_ || flashmask) {
      const float hidden_score = layout_.score_scale < 0 ? INFINITY : -INFINITY;  // scaled: -inf
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t hidden = hidden_strides(half, tile);
#pragma unroll
        for (int i = 0; i < kThreadStrides; ++i) {
          if (hidden >> i & 1) at(half, i) = hidden_score;
        }
      }
    }
    if (maximum || __any_sync(~0u, reference_[0] == -INFINITY || reference_[1] == -INFINITY)) {
      raise_reference(at, maximum);
    }
    if (maximum) return;

    float sums[2][Sums::kOwn];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float minus_reference = reference_[half] == -INFINITY ? 0.f : -reference_[half];
#pragma unroll
      for (int i = 0; i < kThreadStrides; ++i) {
        at(half, i) = exp2_approx(fmaf(at(half, i), layout_.score_scale, minus_reference));
      }
#pragma unroll
      for (int block = 0; block < Sums::kOwn; ++block) {
        float& sum = sums[half][block];
        sum = at(half, block * Sums::kOwnStrides) + at(half, block * Sums::kOwnStrides + 1);
#pragma unroll
        for (int i = 2; i < Sums::kOwnStrides; ++i) sum += at(half, block * Sums::kOwnStrides + i);
        row_sum_[half] += sum;
      }
    }
    while (read_position_ < position_ + tile) read_position_ = shared_.sums_position;
    Sums::store(sums, block_sums_ + static_cast<int64_t>(tile) * (kTileQueries * Sums::kBlocks));
  }

  // Adds to the products what the variances within the strides add to the scores.
  __device__ void add_spread(Scores& scores) const {
    const auto* variances = reinterpret_cast<const float4*>(shared_.variance[keys_.slot] +
                                                            threadIdx.x % 4 * kThreadVariances);
    const float* weights = shared_.row_factor[slot_][consumer_] + row();
#pragma unroll
    for (int i = 0; i < kThreadStrides; i += 4) {
      const float4 four = variances[i / 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto add = [&](int j, float variance) {
          float& score = scores(accumulator_index(half, i + j));
          score = fmaf(weights[half * 8], variance, score);
        };
        add(0, four.x), add(1, four.y), add(2, four.z), add(3, four.w);
      }
    }
  }

  template <typename Element>
  __device__ static float square_of(const uint4& eight) {
    float square = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float q = element<Element>(eight, e);
      square = fmaf(q, q, square);
    }
    return square;
  }

  // Makes the largest score so far the reference of each row, or unless `always` only of rows that
  // have none yet.
  template <typename At>
  __device__ void raise_reference(const At& at, bool always) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kThreadStrides; ++i) {
        largest = fmaxf(largest, at(half, i) * layout_.score_scale);
      }
      largest = quad_max(largest);
      if (always || reference_[half] == -INFINITY)
        reference_[half] = fmaxf(reference_[half], largest);
    }
  }

  __device__ const RowTile& rows() const { return shared_.item[slot_].rows[consumer_]; }

  // The thread's first row in the row tile; its second is 8 rows further on.
  __device__ static int row() { return threadIdx.x % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4; }

  __device__ int row_token(int half) const {
    return rows().first_token + (row() + half * 8) * static_cast<int>(params_.sampling.stride);
  }

  // How many strides a row may see under the diagonal and before the end of the sequence.
  __device__ int row_limit(int half) const {
    const int token = row_token(half);
    const Visibility& visibility = calls_.params_of(shared_.item[slot_], params_).visibility;
    return rows().active && token < visibility.seqlen_q
               ? visible_strides<kKeyStride>(visibility,
                                             calls_.layout_of(shared_.item[slot_], layout_), token)
               : 0;
  }

  // Bit i: the row does not see stride i of the thread's 32.
  __device__ uint32_t hidden_strides(int half, int tile) const {
    const int first = tile * kTileStrides + static_cast<int>(threadIdx.x) % 4 * kThreadStrides;
    const int seen = row_limit(half) - first;
    uint32_t hidden = seen <= 0 ? ~0u : seen >= kThreadStrides ? 0 : ~0u << seen;
    const Visibility& visibility = params_.visibility;
    if (visibility.row_bounds.data == nullptr || !rows().active) return hidden;

    const int64_t batch = shared_.item[slot_].batch;
    const SpanBounds* tile_bounds = span_bounds_of(visibility, kKeyStride * kTileStrides,
                                                   workspace_.tile_bounds, batch, rows().head);
    if (!tile_bounds[tile].meets(rows().first_token, rows().last_token)) return hidden;
    const SpanBounds* stride_bounds =
        span_bounds_of(visibility, kKeyStride, workspace_.stride_bounds, batch, rows().head);
    const int token = row_token(half);
    const int end = min(kThreadStrides, layout_.num_strides - first);
#pragma unroll 4
    for (int i = 0; i < end; ++i) {
      if (stride_bounds[first + i].hides(token, token)) hidden |= 1u << i;
    }
    return hidden;
  }

  const EstimateParams& params_;
  const WorkLayout& layout_;
  const Calls& calls_;
  const Workspace<Traits>& workspace_;
  SharedStorage& shared_;
  const int consumer_;
  RingPosition<Traits::kKeySlots> keys_;
  int slot_;           // of the item
  int warp_limit_;     // how many strides all rows of the warp may see
  float* block_sums_;  // where the thread writes the sums of the first tile
  // The position up to which sums must have been read back before those of the item's first tile
  // may be written, and the one up to which they have been.
  int64_t position_ = 1 - kItemPosition, read_position_ = 0;
  float reference_[2], row_sum_[2];
};

}  // namespace rrattn::cuda::sm90::estimate
