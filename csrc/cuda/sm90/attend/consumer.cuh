// A consumer warp group of block-sparse attention: 64 rows of a query block, against the tiles that
// the producer brings.
//
// While the softmax of one tile is computed, the tensor cores multiply the previous tile's
// probabilities by its values. The two consumers also take turns at the tensor cores, so that the
// softmax of one overlaps the products of the other. A row is written beside the next one's first product.
//
// Probabilities are relative to a base of their row: its largest score in the first tile in which
// it sees anything. Later tiles need no maximum and no rescaling, because floats have room for
// larger probabilities. A tile in which they may not fit is computed again, on larger bases.
//
// That is faster than a maximum for each tile, and so are the turns faster than none: figures of
// these and other variants are in docs/tuning.md.
#pragma once

#include "../../common/store_row.cuh"
#include "../common/wgmma.cuh"
#include "producer.cuh"

namespace rrattn::cuda::sm90::attend {

// The largest sum of a thread's probabilities of one row in a tile that still counts as fitting:
// below float16's largest number, and far above 1.
constexpr float kLargestFittingSum = 0x1p12f;

// kUnseenKeys: whether some blocks may hold keys that no row sees. kCompensate: whether there are
// tiles of means. Params: KernelParams, or RaggedKernelParams.
template <typename Traits, bool kUnseenKeys, bool kCompensate, typename Params>
class Consumer {
  static constexpr bool kRagged = std::is_same_v<Params, RaggedKernelParams>;
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<kConsumerRows>, Int<Traits::kTileN>>{}));
  using Out = decltype(partition_fragment_C(typename Traits::OutMma{},
                                            Shape<Int<kConsumerRows>, Int<Traits::kHeadDimV>>{}));
  static constexpr int kRowScores = Traits::kTileN / 4;  // of a row, in one thread
  static constexpr int kEarlyScores = kRowScores / 4;    // exponentiated before the wait for P V
  static constexpr int kChains = 4;  // of additions, side by side to hide their latency
  using ChainSums = float[2][kChains];
  static constexpr int kRowOuts = Traits::kHeadDimV / 4;
  // The first operand of the second product lies in registers, in the order of the scores.
  using Probabilities = decltype(typename Traits::OutMma{}.get_thread_slice(0).partition_fragment_A(
      make_tensor(static_cast<Element*>(nullptr),
                  make_layout(Shape<Int<kConsumerRows>, Int<Traits::kTileN>>{}))));

 public:
  __device__ Consumer(const Params& params, SharedStorage& shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer) {
    const float scale = params.attend.softmax_scale;
    product_scale_ = scale > kLateScalesAbove<kCompensate> ? 1 : scale;
    score_scale_ = (scale > kLateScalesAbove<kCompensate> ? scale : 1) * kLog2E;
    if (consumer == 1) give_turn(0);
  }

  __device__ void consume_rows() {
    Out out;
    RowItem last{-1, 0, 0, 0, true};  // the row before, still to be written
    for (RingPosition<1> rows;; rows.advance()) {
      shared_.row_full.wait(rows.parity);
      const RowItem row = shared_.row;
      shared_.row_empty.arrive();
      if (row.index < 0 || row.without_tiles) {
        finish(last, out);
        if (row.index < 0) return;
      } else {
        attend(row, last, out);
      }
      if (params_.attend.sink != nullptr) add_sink(row, out);
      last = row;
    }
  }

 private:
  // Writes the last row, and is ready for another.
  __device__ __forceinline__ void finish(const RowItem& last, Out& out) {
    write(last, out);
    clear(out);
    row_base_[0] = row_base_[1] = -INFINITY;
    unseen_ = true;
    row_sum_[0] = row_sum_[1] = 0;
  }

  __device__ void attend(const RowItem& row, const RowItem& last, Out& out) {
    Scores scores;
    Probabilities probabilities;
    shared_.query_full[consumer_].wait(queries_.parity);
    queries_.advance();
    if constexpr (kRagged) clear_missing_queries(row);
    shared_.key_full[keys_.slot].wait(keys_.parity);
    KeyTile tile = shared_.tile[keys_.slot];
    take_turn();
    multiply_keys(scores);
    give_turn(1 - consumer_);
    finish(last, out);  // while the first products are under way
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    if (kCompensate && tile.is_of_means()) {
      start_bases<kCompensate>(row, tile, scores);
    } else {
      start_bases<false>(row, tile, scores);
    }
    ChainSums sums;
    exponentiate<0, kRowScores>(scores, sums);
    add_sums(sums);
    convert(scores, probabilities);
    release_key(tile);
    // Two loops, so that what tiles of means need costs those of keys nothing.
    while (!(kCompensate ? tile.last_of_keys : tile.last))
      take_tile<false>(row, tile, scores, probabilities, sums, out);
    if constexpr (kCompensate) {
      while (!tile.last) take_tile<true>(row, tile, scores, probabilities, sums, out);
    }
    shared_.value_full[values_.slot].wait(values_.parity);
    multiply_values(probabilities, out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release_value();
  }

  // Zeroes what the copy brought of another request's queries. No number in these may decide about the
  // bases of this one's, which share their warps.
  __device__ void clear_missing_queries(const RowItem& row) const {
    const int seqlen_q = static_cast<int>(attend_of(params_, row).visibility.seqlen_q);
    const int there = seqlen_q - (row.m_block * kBlockSize + consumer_ * kConsumerRows);
    if (there >= kConsumerRows) return;
    for (int i = static_cast<int>(threadIdx.x) % kWarpGroup; i < Traits::kPanels * kConsumerRows;
         i += kWarpGroup) {
      if (i % kConsumerRows < there) continue;
      auto* chunks = reinterpret_cast<uint4*>(shared_.query[consumer_] + i * Traits::kPanelColumns);
      for (int chunk = 0; chunk < Traits::kPanelColumns / 8; ++chunk)
        chunks[chunk] = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy_shared();  // wgmma reads what these stores wrote
    // Until all of the warp group have.
    cutlass::arch::NamedBarrier::sync(kWarpGroup, kConsumers + consumer_);
  }

  // The products with the next tile, while those of the last tile's probabilities with its values
  // are under way.
  template <bool kMeans>
  __device__ __forceinline__ void take_tile(const RowItem& row, KeyTile& tile, Scores& scores,
                                            Probabilities& probabilities, ChainSums& sums,
                                            Out& out) {
    shared_.key_full[keys_.slot].wait(keys_.parity);
    tile = shared_.tile[keys_.slot];
    take_turn();
    multiply_keys(scores);
    shared_.value_full[values_.slot].wait(values_.parity);
    multiply_values(probabilities, out);
    give_turn(1 - consumer_);
    warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    if (!tile.plain || unseen_) start_bases<kMeans>(row, tile, scores);
    exponentiate<0, kEarlyScores>(scores, sums);
    compute_here(sums[0][kChains - 1] + sums[1][kChains - 1]);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release_value();
    exponentiate<kEarlyScores, kRowScores>(scores, sums);
    convert(scores, probabilities);
    if (may_not_fit(sums)) {
      raise_bases<kMeans>(row, tile, scores, sums, out);
      convert(scores, probabilities);
    }
    add_sums(sums);
    release_key(tile);
  }

  // Starts scores = Q K^T of the current slot.
  __device__ void multiply_keys(Scores& scores) {
    typename Traits::ScoreMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    start_product<GMMA::ScaleOut::Zero>(
        mma,
        thread_mma.partition_fragment_A(
            make_tensor(make_smem_ptr(shared_.query[consumer_]), typename Traits::QueryLayout{})),
        thread_mma.partition_fragment_B(
            make_tensor(make_smem_ptr(shared_.key[keys_.slot]), typename Traits::KeyLayout{})),
        scores);
  }

  // Starts out += P V of the current slot.
  __device__ void multiply_values(Probabilities& probabilities, Out& out) {
    typename Traits::OutMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    warpgroup_fence_operand(probabilities);
    start_product<GMMA::ScaleOut::One>(
        mma, probabilities,
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(shared_.value[values_.slot]),
                                                    typename Traits::ValueLayout{})),
        out);
  }

  __device__ void release_key(const KeyTile& tile) {
    shared_.key_empty[keys_.slot].arrive();
    if (tile.last) shared_.query_empty[consumer_].arrive();
    keys_.advance();
  }

  __device__ void release_value() {
    if (threadIdx.x % 32 == 0) shared_.value_empty[values_.slot].arrive();
    values_.advance();
  }

  // Scales and hides scores, and gives rows that have seen nothing before their largest score as a
  // base.
  template <bool kMeans>
  __device__ void start_bases(const RowItem& row, const KeyTile& tile, Scores& scores) {
    if (!tile.plain) adjust<kMeans>(row, tile, scores);
    if (!unseen_) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float largest = score_scale_ * largest_score(scores, half);
      if (row_base_[half] == -INFINITY) row_base_[half] = largest;
    }
    unseen_ = __any_sync(~0u, row_base_[0] == -INFINITY || row_base_[1] == -INFINITY);
  }

  // Whether a score of the warp is so far above its row's base that its probability may not fit the
  // type, or is NaN. Rare.
  __device__ static bool may_not_fit(const ChainSums& sums) {
    return __any_sync(~0u, !(row_total(sums[0]) <= kLargestFittingSum &&
                             row_total(sums[1]) <= kLargestFittingSum));
  }

  // Computes the warp's part of the tile again, with the largest score so far as each row's base.
  template <bool kMeans>
  __device__ void raise_bases(const RowItem& row, const KeyTile& tile, Scores& scores,
                              ChainSums& sums, Out& out) {
    multiply_keys_again(scores);
    if (!tile.plain) adjust<kMeans>(row, tile, scores);
    const float largest[2] = {score_scale_ * largest_score(scores, 0),
                              score_scale_ * largest_score(scores, 1)};
    raise_bases_to(largest, out);
    exponentiate<0, kRowScores>(scores, sums);
  }

  // Brings the sums and out to the bases that are at least these.
  __device__ void raise_bases_to(const float (&least)[2], Out& out) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = fmaxf(row_base_[half], least[half]);
      factor[half] = exp2_approx(row_base_[half] - finite(base));
      row_base_[half] = base;
      row_sum_[half] *= factor[half];
    }
#pragma unroll
    for (int i = 0; i < kRowOuts; ++i) {
      out(accumulator_index(0, i)) *= factor[0];
      out(accumulator_index(1, i)) *= factor[1];
    }
  }

  // Lets the sink join the sums of the rows, once in each quad.
  __device__ void add_sink(const RowItem& row, Out& out) {
    const float sink = params_.attend.sink[row.head] * kLog2E;
    raise_bases_to({sink, sink}, out);
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row_sum_[half] += exp2_approx(sink - finite(row_base_[half]));
  }

  __device__ static float largest_score(const Scores& scores, int half) {
    float largest = scores(accumulator_index(half, 0));
#pragma unroll
    for (int i = 1; i < kRowScores; ++i)
      largest = fmaxf(largest, scores(accumulator_index(half, i)));
    return quad_max(largest);
  }

  // The scores of one warp, by its own products: those of the warp group (wgmma) need all four
  // warps.
  __device__ void multiply_keys_again(Scores& scores) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first = static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 + lane / 4;
    const auto query = [&](int row, int column) {
      return *reinterpret_cast<const uint32_t*>(shared_.query[consumer_] +
                                                typename Traits::QueryOffsets{}(row, column));
    };
    const auto key = [&](int row, int column) {
      return *reinterpret_cast<const uint32_t*>(shared_.key[keys_.slot] +
                                                typename Traits::KeyOffsets{}(row, column));
    };
    clear(scores);
#pragma unroll 1
    for (int k = lane % 4 * 2; k < Traits::kHeadDim; k += 16) {
      const uint32_t a[4] = {query(first, k), query(first + 8, k), query(first, k + 8),
                             query(first + 8, k + 8)};
#pragma unroll
      for (int n = 0; n < Traits::kTileN; n += 8) {
        Traits::WarpScoreMma::fma(scores(n / 2), scores(n / 2 + 1), scores(n / 2 + 2),
                                  scores(n / 2 + 3), a[0], a[1], a[2], a[3], key(n + lane / 4, k),
                                  key(n + lane / 4, k + 8), scores(n / 2), scores(n / 2 + 1),
                                  scores(n / 2 + 2), scores(n / 2 + 3));
      }
    }
  }

  // Turns scores into probabilities, and adds these up.
  template <int kBegin, int kEnd>
  __device__ void exponentiate(Scores& scores, ChainSums& sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = finite(row_base_[half]);
#pragma unroll
      for (int i = kBegin; i < kEnd; ++i) {
        float& score = scores(accumulator_index(half, i));
        score = exp2_approx(fmaf(score, score_scale_, -base));
        float& sum = sums[half][i % kChains];
        sum = i < kChains ? score : sum + score;
      }
    }
  }

  __device__ static float row_total(const float (&sums)[kChains]) {
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  __device__ void add_sums(const ChainSums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum_[half] += row_total(sums[half]);
  }

  __device__ static float finite(float base) { return base == -INFINITY ? 0 : base; }

  // Scales products by a scale that is not late, makes hidden scores -infinity, and adds to those of
  // means the logarithm of how many keys they stand for.
  template <bool kMeans>
  __device__ void adjust(const RowItem& row, const KeyTile& tile, Scores& scores) const {
    uint32_t hidden[2];  // bit i: score i is hidden
    int last = -1;       // of the thread's columns, the last block's
    if constexpr (kMeans) {
      const int first = static_cast<int>(threadIdx.x) % 4 * 2;  // column of the thread
      hidden[0] = hidden[1] = hidden_means(first);
      last = static_cast<int>(params_.attend.visibility.num_n_blocks()) - 1 - tile.first_block() -
             first;
    } else {
      find_hidden<kUnseenKeys, kRowScores>(
          attend_of(params_, row).visibility, row, tile.first_key, !kRagged && tile.bounded,
          [&](int half) { return row_token(row, half); }, hidden);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        float& score = scores(accumulator_index(half, i));
        float adjusted = score * product_scale_;
        if constexpr (kMeans) adjusted += params_.added_to_means.added;
        score = hidden[half] >> i & 1 ? -INFINITY : adjusted;
        if (kMeans && accumulator_column(i) == last) score += params_.added_to_means.added_last;
      }
    }
  }

  // Of a tile of means, for all rows: bit i, score i is hidden. The thread has columns first +
  // accumulator_column(i).
  __device__ uint32_t hidden_means(int first) const {
    uint32_t hidden = 0;
#pragma unroll
    for (int word = 0; word < Traits::kMeanWords; ++word) {
      // Bits 0, 1, 8, 9, 16, 17, 24 and 25 close ranks.
      uint32_t bits = ~shared_.stood_in_for[keys_.slot][word] >> first & 0x03030303;
      bits = (bits | bits >> 6) & 0x000f000f;
      bits = (bits | bits >> 12) & 0xff;
      hidden |= bits << word * 8;
    }
    return hidden;
  }

  __device__ static void convert(const Scores& scores, Probabilities& probabilities) {
#pragma unroll
    for (int i = 0; i < size(scores); ++i) probabilities(i) = static_cast<Element>(scores(i));
  }

  // Divides by the row sums and writes out and lse; of no row if its index is < 0.
  __device__ __forceinline__ void write(const RowItem& row, Out& out) {
    const AttendParams& attend = attend_of(params_, row);
    const Visibility& visibility = attend.visibility;
    float sums[2], scales[2];
    Element* rows[2];
    bool valid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum_[half]);
      sums[half] = sum;
      scales[half] = sum == 0 ? 0 : __fdividef(1, sum);
      const int64_t token = row_token(row, half);
      valid[half] = row.index >= 0 && token < visibility.seqlen_q;
      rows[half] = static_cast<Element*>(attend.out.data) +
                   (kRagged ? 0 : row.batch * attend.out.batch_stride) +
                   row.head * attend.out.head_stride + token * attend.out.row_stride;
    }
    store_rows(out, scales, rows, valid, static_cast<int>(attend.heads.head_dim_v),
               params_.aligned_out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (valid[half] && threadIdx.x % 4 == 0) {
        attend.lse[head_lse(row, visibility) + row_token(row, half)] =
            sums[half] == 0 ? -INFINITY : (row_base_[half] + __log2f(sums[half])) * kLn2;
      }
    }
  }

  // Where the log-sum-exps of the head begin.
  __device__ int64_t head_lse(const RowItem& row, const Visibility& visibility) const {
    if constexpr (kRagged) return row.head * params_.plan.attend[row.batch].lse_head_stride;
    return (row.batch * visibility.num_heads + row.head) * visibility.seqlen_q;
  }

  __device__ int row_token(const RowItem& row, int half) const {
    return row.m_block * kBlockSize + consumer_ * kConsumerRows +
           static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
  }

  // At the tensor cores.
  __device__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, consumer_);
  }
  __device__ static void give_turn(int consumer) {
    cutlass::arch::NamedBarrier::arrive(kConsumerThreads, consumer);
  }

  const Params& params_;
  SharedStorage& shared_;
  const int consumer_;
  float product_scale_, score_scale_;  // the latter in units of log2
  RingPosition<1> queries_;
  RingPosition<Traits::kKeySlots> keys_;
  RingPosition<Traits::kValueSlots> values_;
  float row_base_[2];  // that the sums are relative to
  bool unseen_;        // some row of the warp has not seen a score
  float row_sum_[2];   // the thread's share
};

}  // namespace rrattn::cuda::sm90::attend
