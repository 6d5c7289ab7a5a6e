// A consumer warp group of block-sparse attention: 64 rows of a query block, against the tiles that
// the producer brings.
//
// While the softmax of one tile is computed, the tensor cores multiply the last tile's
// probabilities with the values; and the two groups take turns at the tensor cores, so that the
// one's softmax falls into the other's products.
//
// Measured on an H200 (32 heads over 8, D 128, causal, 50% of the blocks of 32,768 / 131,072
// tokens, TFLOP/s), each beside this in the same run: rescaling only when the base rises by more
// than 2^8 606 / 616 (this 617 / 619; the branch costs more than it saves), that with 3 stages
// 605 / 611, and without turns 611 / 623; queries kept in registers 609 / 603 and rows in the order
// of their lengths 611 / 604 (this 612 / 614); a softmax that ptxas is kept from putting behind the
// wait for the second product 566 / 585 (this 644 / 633).
#pragma once

#include "attend_producer.cuh"
#include "softmax.cuh"
#include "store_row.cuh"

namespace rrattn::cuda {

template <typename Traits>
class AttendConsumer {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<kGroupRows>, Int<Traits::kTileN>>{}));
  using Out = decltype(partition_fragment_C(typename Traits::OutMma{},
                                            Shape<Int<kGroupRows>, Int<Traits::kHeadDim>>{}));
  static constexpr int kRowScores = Traits::kTileN / 4;  // of a row, in one thread
  static constexpr int kRowOuts = Traits::kHeadDim / 4;
  // The first operand of the second product lies in registers, in the order of the scores.
  using Probabilities = decltype(typename Traits::OutMma{}.get_thread_slice(0).partition_fragment_A(
      make_tensor(static_cast<Element*>(nullptr),
                  make_layout(Shape<Int<kGroupRows>, Int<Traits::kTileN>>{}))));

 public:
  __device__ AttendConsumer(const AttendKernelParams& params, SharedStorage& shared, int group)
      : params_(params), shared_(shared), group_(group) {
    // With a scale that is not positive the largest product is not the largest score: then the
    // products are scaled first.
    const float scale = params.attend.softmax_scale;
    product_scale_ = scale > 0 ? 1 : scale;
    score_scale_ = (scale > 0 ? scale : 1) * kLog2E;
    if (group == 1) give_turn(0);
  }

  __device__ void consume_rows() {
    for (RingPosition<1> rows;; rows.advance()) {
      shared_.row_full.wait(rows.parity);
      const AttendRow row = shared_.row;
      shared_.row_empty.arrive();
      if (row.index < 0) return;
      const RowPlace place(params_.attend.visibility, row.index);
      Out out;
      clear(out);
      row_base_[0] = row_base_[1] = -INFINITY;
      row_sum_[0] = row_sum_[1] = 0;
      if (!row.nothing_selected) attend(place, out);
      write(place, out);
    }
  }

 private:
  __device__ void attend(const RowPlace& place, Out& out) {
    Scores scores;
    Probabilities probabilities;
    float factor[2];
    shared_.query_full.wait(queries_.parity);
    queries_.advance();
    shared_.key_full[keys_.slot].wait(keys_.parity);
    AttendTile tile = shared_.tile[keys_.slot];
    multiply_keys(scores);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    release_key(tile);
    softmax(place, tile, scores, factor);
    convert(scores, probabilities);
    while (!tile.last) {
      shared_.key_full[keys_.slot].wait(keys_.parity);
      tile = shared_.tile[keys_.slot];
      take_turn();
      multiply_keys(scores);
      shared_.value_full[values_.slot].wait(values_.parity);
      multiply_values(probabilities, out);
      give_turn(1 - group_);
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      release_key(tile);
      softmax(place, tile, scores, factor);
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      release_value();
#pragma unroll
      for (int i = 0; i < kRowOuts; ++i) {
        out(i / 2 * 4 + i % 2) *= factor[0];
        out(i / 2 * 4 + 2 + i % 2) *= factor[1];
      }
      convert(scores, probabilities);
    }
    shared_.value_full[values_.slot].wait(values_.parity);
    multiply_values(probabilities, out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release_value();
  }

  // scores = Q K^T of the stage at hand.
  __device__ void multiply_keys(Scores& scores) {
    typename Traits::ScoreMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    auto query = thread_mma.partition_fragment_A(
        make_tensor(make_smem_ptr(shared_.query[group_]), typename Traits::QueryLayout{}));
    auto key = thread_mma.partition_fragment_B(
        make_tensor(make_smem_ptr(shared_.key[keys_.slot]), typename Traits::KeyLayout{}));
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(query); ++k) {
      cute::gemm(mma, query(_, _, k), key(_, _, k), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  // out += P V of the stage at hand.
  __device__ void multiply_values(Probabilities& probabilities, Out& out) {
    typename Traits::OutMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    auto value = thread_mma.partition_fragment_B(
        make_tensor(make_smem_ptr(shared_.value[values_.slot]), typename Traits::ValueLayout{}));
    warpgroup_fence_operand(probabilities);
    warpgroup_fence_operand(out);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < size<2>(value); ++k) {
      cute::gemm(mma, probabilities(_, _, k), value(_, _, k), out);
    }
    warpgroup_commit_batch();
  }

  __device__ void release_key(const AttendTile& tile) {
    shared_.key_empty[keys_.slot].arrive();
    if (tile.last && threadIdx.x % 32 == 0) shared_.query_empty.arrive();
    keys_.advance();
  }

  __device__ void release_value() {
    if (threadIdx.x % 32 == 0) shared_.value_empty[values_.slot].arrive();
    values_.advance();
  }

  // Turns scores into probabilities relative to the new row_base_; what was summed up before is to
  // be multiplied with `factor`.
  __device__ void softmax(const RowPlace& place, const AttendTile& tile, Scores& scores,
                          float (&factor)[2]) {
    // Score i of the thread's, of row row() + 8 half.
    const auto at = [&](int half, int i) -> float& { return scores(i / 2 * 4 + half * 2 + i % 2); };
    if (product_scale_ != 1) {
#pragma unroll
      for (int i = 0; i < size(scores); ++i) scores(i) *= product_scale_;
    }
    if (tile.masked) hide(place, tile, at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Four chains each, to hide the latency of one.
      float largest[4];
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        largest[i % 4] = i < 4 ? at(half, i) : fmaxf(largest[i % 4], at(half, i));
      }
      const float tile_base = score_scale_ * quad_max(fmaxf(fmaxf(largest[0], largest[1]),
                                                            fmaxf(largest[2], largest[3])));
      const float new_base = fmaxf(row_base_[half], tile_base);
      const float base = new_base == -INFINITY ? 0 : new_base;  // nothing seen yet: -inf stays
      factor[half] = exp2_approx(row_base_[half] - base);
      row_base_[half] = new_base;
      float sum[4];
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        at(half, i) = exp2_approx(fmaf(at(half, i), score_scale_, -base));
        sum[i % 4] = i < 4 ? at(half, i) : sum[i % 4] + at(half, i);
      }
      row_sum_[half] = row_sum_[half] * factor[half] + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  template <typename At>
  __device__ void hide(const RowPlace& place, const AttendTile& tile, const At& at) const {
    const Visibility& visibility = params_.attend.visibility;
    const RowBounds& layout = visibility.row_bounds;
    const int first = tile.first_key + static_cast<int>(threadIdx.x) % 4 * 2;
    const int end_key = static_cast<int>(visibility.seqlen_k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = row_token(place, half);
      const int end = visibility.causal
                          ? min(token + static_cast<int>(visibility.shift()) + 1, end_key)
                          : end_key;
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        if (first + i / 2 * 8 + i % 2 >= end) at(half, i) = -INFINITY;
      }
    }
    if (layout.data == nullptr) return;
    const int32_t* bounds = row_bounds_of(layout, place.batch, visibility.bounds_head(place.head));
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
      const int key = first + i / 2 * 8 + i % 2;
      if (key >= end_key) continue;
      const KeyBounds key_bounds = load_key_bounds(layout, visibility.causal, bounds, key);
      if (key_bounds.mask(row_token(place, 0))) at(0, i) = -INFINITY;
      if (key_bounds.mask(row_token(place, 1))) at(1, i) = -INFINITY;
    }
  }

  __device__ static void convert(const Scores& scores, Probabilities& probabilities) {
#pragma unroll
    for (int i = 0; i < size(scores); ++i) probabilities(i) = static_cast<Element>(scores(i));
  }

  // Divides by the row sums and writes out and lse.
  __device__ void write(const RowPlace& place, Out& out) {
    const AttendParams& attend = params_.attend;
    const Visibility& visibility = attend.visibility;
    const int head_dim = static_cast<int>(attend.heads.head_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum_[half]);
      const float scale = sum == 0 ? 0 : 1 / sum;
      const int64_t token = row_token(place, half);
      Element* row = static_cast<Element*>(attend.out.data) +
                     place.batch * attend.out.batch_stride + place.head * attend.out.head_stride +
                     token * attend.out.row_stride;
      if (token < visibility.seqlen_q && threadIdx.x % 4 == 0) {
        attend
            .lse[(place.batch * visibility.num_heads + place.head) * visibility.seqlen_q + token] =
            sum == 0 ? -INFINITY : (row_base_[half] + log2f(sum)) * kLn2;
      }
      store_row(out, half, scale, row, token < visibility.seqlen_q, head_dim, params_.aligned_out);
    }
  }

  __device__ int row_token(const RowPlace& place, int half) const {
    return place.m_block * kBlockSize + group_ * kGroupRows +
           static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
  }

  __device__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(kConsumerGroups * kWarpGroup, group_);
  }
  __device__ static void give_turn(int group) {
    cutlass::arch::NamedBarrier::arrive(kConsumerGroups * kWarpGroup, group);
  }

  const AttendKernelParams& params_;
  SharedStorage& shared_;
  const int group_;
  float product_scale_, score_scale_;  // the latter in units of log2
  RingPosition<1> queries_;
  RingPosition<Traits::kStages> keys_, values_;
  float row_base_[2];  // the largest score so far, which the sums are relative to
  float row_sum_[2];   // the thread's share
};

}  // namespace rrattn::cuda
