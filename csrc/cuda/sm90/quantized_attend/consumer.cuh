// A consumer warp group of attention in eight bits: 64 rows of a query block, against the tiles that
// the producer brings. It works as that of ../attend/consumer.cuh: the tensor cores multiply the
// previous tile's probabilities by its values while the softmax of a tile is computed, and the two
// consumers take turns at them.
//
// The base of a row is the whole number above its largest score in the first tile in which it sees
// anything. Later tiles need no maximum: e4m3 has room for probabilities up to 1.69 times as large,
// and where one has become the largest number of e4m3 the warp raises its bases. Bases are whole, so
// that no base changes the rounding of a probability.
//
// Columns of ones behind those of the values have the second product add up the rounded
// probabilities of each row, in all four threads of its quad.
#pragma once

#include "config.cuh"
// config.cuh comes first
#include "../../common/softmax.cuh"
#include "../../common/store_row.cuh"
#include "../common/wgmma.cuh"
#include "producer.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

constexpr float kProbabilityBits = 8;  // kProbabilityScale is 2 to this
static_assert(kProbabilityScale == 1 << 8);

// Two numbers as e4m3, the first in the lower byte; those above 448 become 448.
__device__ inline uint32_t to_e4m3(float first, float second) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

// kUnseenKeys: whether some blocks may hold keys that no row sees.
template <typename Traits, bool kUnseenKeys>
class Consumer {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kHeadDim = Traits::kHeadDim;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<kConsumerRows>, Int<kBlockSize>>{}));
  using Out = decltype(partition_fragment_C(typename Traits::OutMma{},
                                            Shape<Int<kConsumerRows>, Int<Traits::kOutColumns>>{}));
  static constexpr int kRowScores = kBlockSize / 4;  // of a row, in one thread
  static constexpr int kFours = kRowScores / 4;      // of them, that are neighbours by position
  static constexpr int kEarlyFours = kFours / 4;     // exponentiated before the wait for P V
  static constexpr int kRowOuts = kHeadDim / 4;
  // The first operand of the second product: registers, four for each 32 keys.
  using Probabilities = decltype(make_tensor<uint32_t>(Shape<_4, _1, Int<kBlockSize / 32>>{}));

 public:
  __device__ Consumer(const KernelParams<kHeadDim>& params, SharedStorage& shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer) {
    if (consumer == 1) give_turn(0);
  }

  __device__ void consume_rows() {
    for (RingPosition<1> rows;; rows.advance()) {
      shared_.row_full.wait(rows.parity);
      const RowItem row = shared_.row;
      shared_.row_empty.arrive();
      if (row.index < 0) return;
      Out out;
      clear(out);
      row_base_[0] = row_base_[1] = -INFINITY;
      unseen_ = true;
      has_sums_ = false;
      tiles_in_out_ = 0;
      if (!row.without_tiles) attend(row, out);
      if (params_.attend.sink != nullptr) add_sink(row, out);
      write(row, out);
    }
  }

 private:
  __device__ void attend(const RowItem& row, Out& out) {
    Scores scores;
    shared_.query_full[queries_.slot].wait(queries_.parity);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = shared_.query[queries_.slot].scale[row_in_block(half)];
      query_scale_[half] = isnan(scale) ? 0 : scale;  // until the end
    }
    shared_.key_full[keys_.slot].wait(keys_.parity);
    TileNote tile = shared_.note[keys_.slot];
    multiply_keys(scores);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    uint32_t hidden[2];
    start_bases(row, tile, scores, hidden);
    exponentiate<true, 0, kFours>(scores, hidden);
    Probabilities probabilities;
    convert(scores, probabilities);
    release_key(tile);
    while (!tile.last) take_tile(row, tile, scores, probabilities, out);
    shared_.value_full[values_.slot].wait(values_.parity);
    multiply_values(probabilities, out);
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release_value();
    if (has_sums_) add_sums(out);
    spoil_bad_rows(row, out);
  }

  // Rows whose query is not finite become NaN, where they see anything.
  __device__ void spoil_bad_rows(const RowItem& row, Out& out) const {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = params_.workspace.query_tiles[row.index].scale[row_in_block(half)];
      factor[half] = isnan(scale) && row_base_[half] != -INFINITY ? NAN : 1;
    }
    scale_rows(out, factor);
  }

  // The products with the next tile, while those of the last tile's probabilities with its values
  // are under way.
  __device__ __forceinline__ void take_tile(const RowItem& row, TileNote& tile, Scores& scores,
                                            Probabilities& probabilities, Out& out) {
    shared_.key_full[keys_.slot].wait(keys_.parity);
    tile = shared_.note[keys_.slot];
    take_turn();
    multiply_keys(scores);
    shared_.value_full[values_.slot].wait(values_.parity);
    multiply_values(probabilities, out);
    give_turn(1 - consumer_);
    warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    uint32_t hidden[2];
    const bool plain = tile.plain && !unseen_;
    if (plain) {
      exponentiate<false, 0, kEarlyFours>(scores, hidden);
    } else {
      start_bases(row, tile, scores, hidden);
      exponentiate<true, 0, kEarlyFours>(scores, hidden);
    }
    compute_here(__int_as_float(scores(accumulator_index(1, kEarlyFours * 4 - 1))));
    warpgroup_wait<0>();
    warpgroup_fence_operand(out);
    release_value();
    if (plain) {
      exponentiate<false, kEarlyFours, kFours>(scores, hidden);
    } else {
      exponentiate<true, kEarlyFours, kFours>(scores, hidden);
    }
    ++tiles_in_out_;
    const uint32_t saturated = convert(scores, probabilities);
    if (__any_sync(~0u, (saturated & 0x80808080) != 0)) {
      raise_bases(row, tile, scores, out);
      convert(scores, probabilities);
    } else if (tiles_in_out_ >= Traits::kFlushTiles) {
      flush(out);
    }
    release_key(tile);
  }

  // Starts scores = Q K^T of the current slot.
  __device__ void multiply_keys(Scores& scores) {
    typename Traits::ScoreMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    start_product<GMMA::ScaleOut::Zero>(
        mma,
        thread_mma.partition_fragment_A(
            make_tensor(make_smem_ptr(query_rows()), typename Traits::QueryLayout{})),
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(shared_.key[keys_.slot].numbers),
                                                    typename Traits::KeyLayout{})),
        scores);
  }

  // Starts out += P V of the current slot.
  __device__ void multiply_values(Probabilities& probabilities, Out& out) {
    typename Traits::OutMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    const auto* values =
        reinterpret_cast<const float_e4m3_t*>(shared_.value[values_.slot].tile.numbers);
    warpgroup_fence_operand(probabilities);
    start_product<GMMA::ScaleOut::One>(mma, probabilities,
                                       thread_mma.partition_fragment_B(make_tensor(
                                           make_smem_ptr(values), typename Traits::ValueLayout{})),
                                       out);
  }

  // Adds out to the sums in shared memory, and makes it zeros.
  __device__ void flush(Out& out) {
    if (has_sums_) add_sums(out);
#pragma unroll
    for (int i = 0; i < Traits::kFourSums; ++i) {
      sums(i) = make_float4(out(i * 4), out(i * 4 + 1), out(i * 4 + 2), out(i * 4 + 3));
    }
    clear(out);
    has_sums_ = true;
    tiles_in_out_ = 0;
  }

  __device__ void add_sums(Out& out) const {
#pragma unroll
    for (int i = 0; i < Traits::kFourSums; ++i) {
      const float4 four = sums(i);
      out(i * 4) += four.x;
      out(i * 4 + 1) += four.y;
      out(i * 4 + 2) += four.z;
      out(i * 4 + 3) += four.w;
    }
  }

  __device__ float4& sums(int i) const {
    return shared_.sums[consumer_][i][threadIdx.x % kWarpGroup];
  }

  __device__ void release_key(const TileNote& tile) {
    shared_.key_empty[keys_.slot].arrive();
    if (tile.last) {
      shared_.query_empty[queries_.slot].arrive();
      queries_.advance();
    }
    keys_.advance();
  }

  __device__ void release_value() {
    if (threadIdx.x % 32 == 0) shared_.value_empty[values_.slot].arrive();
    values_.advance();
  }

  // Finds the hidden scores, and gives rows that have seen nothing before a base.
  __device__ void start_bases(const RowItem& row, const TileNote& tile, const Scores& scores,
                              uint32_t (&hidden)[2]) {
    hidden[0] = hidden[1] = 0;
    if (!tile.plain) {
      find_hidden<kUnseenKeys, kRowScores, true>(
          params_.attend.visibility, row, tile.first_key,
          [&](int half) { return row_token(row, half); }, hidden);
    }
    if (!unseen_) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float least = base_above(scores, half, hidden[half]);
      if (row_base_[half] == -INFINITY) row_base_[half] = least;
    }
    unseen_ = __any_sync(~0u, row_base_[0] == -INFINITY || row_base_[1] == -INFINITY);
  }

  // Brings the warp's probabilities and all that was summed up to bases above the largest scores so
  // far. Probabilities of float32 tell the scores, but for those that are infinite.
  __device__ void raise_bases(const RowItem& row, const TileNote& tile, Scores& scores, Out& out) {
    float least[2], factor[2];
    bool infinite = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kRowScores; ++i)
        largest = fmaxf(largest, __int_as_float(scores(accumulator_index(half, i))));
      largest = quad_max(largest);
      infinite |= largest == INFINITY;
      least[half] = row_base_[half] + ceil_log2(largest) - kProbabilityBits;
    }
    if (__any_sync(~0u, infinite)) {
      raise_bases_far(row, tile, scores, out);
      return;
    }
    raise_bases_to(least, factor);
    scale_rows(out, factor);
    if (has_sums_) scale_sums(factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        int& score = scores(accumulator_index(half, i));
        score = __float_as_int(__int_as_float(score) * factor[half]);
      }
    }
  }

  // The same by scores that are computed again. Rare.
  __device__ void raise_bases_far(const RowItem& row, const TileNote& tile, Scores& scores,
                                  Out& out) {
    flush(out);  // whose registers this needs
    multiply_keys_again(scores);
    uint32_t hidden[2];
    start_bases(row, tile, scores, hidden);
    const float least[2] = {base_above(scores, 0, hidden[0]), base_above(scores, 1, hidden[1])};
    float factor[2];
    raise_bases_to(least, factor);
    scale_sums(factor);
    exponentiate<true, 0, kFours>(scores, hidden);
  }

  // The least whole number from the logarithm on; -127 of 0.
  __device__ static float ceil_log2(float x) {
    return static_cast<float>(((__float_as_int(x) + 0x7fffff) >> 23) - 127);
  }

  __device__ void scale_sums(const float (&factor)[2]) const {
#pragma unroll 1
    for (int i = 0; i < Traits::kFourSums; ++i) {
      float4& four = sums(i);
      four = make_float4(four.x * factor[0], four.y * factor[0], four.z * factor[1],
                         four.w * factor[1]);
    }
  }

  // Raises the bases to at least these, and finds what brings sums to the new ones.
  __device__ void raise_bases_to(const float (&least)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = fmaxf(row_base_[half], least[half]);
      factor[half] = exp2_approx(row_base_[half] - finite(base));
      row_base_[half] = base;
    }
  }

  __device__ static void scale_rows(Out& out, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < size(out) / 2; ++i) {
      out(accumulator_index(0, i)) *= factor[0];
      out(accumulator_index(1, i)) *= factor[1];
    }
  }

  // Lets the sink, which the scores' lack of that of the mean key concerns too, join the sums.
  __device__ void add_sink(const RowItem& row, Out& out) {
    float score[2], least[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      score[half] = (params_.attend.sink[row.head] - mean_score(row, half)) * kLog2E;
      least[half] = ceilf(score[half]);
    }
    raise_bases_to(least, factor);
    scale_rows(out, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      out(accumulator_index(half, kRowOuts)) +=
          exp2_approx(score[half] - finite(row_base_[half]) + kProbabilityBits);
    }
  }

  // The whole number from the row's largest visible score on.
  __device__ float base_above(const Scores& scores, int half, uint32_t hidden) const {
    float largest = -INFINITY;
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      const float4 scale = key_scales(four);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = four * 4 + e;
        const float score =
            scaled(scores(accumulator_index(half, i)), scale, e) * query_scale_[half];
        largest = fmaxf(largest, hidden >> i & 1 ? -INFINITY : score);
      }
    }
    return ceilf(quad_max(largest));
  }

  // The scores of one warp, by its own products: those of the warp group (wgmma) need all four
  // warps.
  __device__ void multiply_keys_again(Scores& scores) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int8_t* query =
        query_rows() + static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 * kHeadDim;
    const int8_t* key = shared_.key[keys_.slot].numbers;
    clear(scores);
#pragma unroll 1
    for (int k = lane % 4 * 4; k < kHeadDim; k += 32) {
      // Eight rows lie side by side, and all eights alike.
      const int at[2] = {typename Traits::KeyOffsets{}(lane / 4, k),
                         typename Traits::KeyOffsets{}(lane / 4, k + 16)};
      const auto word = [&](const int8_t* rows, int half) {
        return *reinterpret_cast<const uint32_t*>(rows + at[half]);
      };
      const uint32_t a[4] = {word(query, 0), word(query + 8 * kHeadDim, 0), word(query, 1),
                             word(query + 8 * kHeadDim, 1)};
#pragma unroll
      for (int n = 0; n < kBlockSize; n += 8) {
        uint32_t sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = static_cast<uint32_t>(scores(n / 2 + i));
        SM80_16x8x32_S32S8S8S32_TN::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3],
                                        word(key + n * kHeadDim, 0), word(key + n * kHeadDim, 1),
                                        sums[0], sums[1], sums[2], sums[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) scores(n / 2 + i) = static_cast<int>(sums[i]);
      }
    }
  }

  // Turns fours of scores into the bits of probabilities in float32.
  template <bool kHides, int kBegin, int kEnd>
  __device__ void exponentiate(Scores& scores, const uint32_t (&hidden)[2]) const {
    const float shift[2] = {kProbabilityBits - finite(row_base_[0]),
                            kProbabilityBits - finite(row_base_[1])};
#pragma unroll
    for (int four = kBegin; four < kEnd; ++four) {
      const float4 scale = key_scales(four);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = four * 4 + e;
          int& score = scores(accumulator_index(half, i));
          float p = exp2_approx(fmaf(scaled(score, scale, e), query_scale_[half], shift[half]));
          if (kHides && hidden[half] >> i & 1) p = 0;
          score = __float_as_int(p);
        }
      }
    }
  }

  // Rounds probabilities to e4m3: of each 32 keys, of the first 16 both rows, then of the others. In
  // the result the upper bit of a byte is set where one has become the largest number of e4m3, 0x7e.
  __device__ static uint32_t convert(const Scores& scores, Probabilities& probabilities) {
    uint32_t saturated = 0;
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto p = [&](int e) {
          return __int_as_float(scores(accumulator_index(half, four * 4 + e)));
        };
        uint32_t& word = probabilities(four * 2 + half);
        word = to_e4m3(p(0), p(1)) | to_e4m3(p(2), p(3)) << 16;
        saturated |= word + 0x02020202;
      }
    }
    return saturated;
  }

  // Whole numbers are below 2^22, which floats have exactly.
  __device__ static float scaled(int score, const float4& scale, int e) {
    return static_cast<float>(score) * (e == 0   ? scale.x
                                        : e == 1 ? scale.y
                                        : e == 2 ? scale.z
                                                 : scale.w);
  }

  // Of the keys of four scores of a row.
  __device__ float4 key_scales(int four) const {
    const int position = four * 16 + static_cast<int>(threadIdx.x) % 4 * 4;
    return *reinterpret_cast<const float4*>(&shared_.key[keys_.slot].scale[position]);
  }

  __device__ static float finite(float base) { return base == -INFINITY ? 0 : base; }

  // Divides by the row sums and writes out and lse.
  __device__ void write(const RowItem& row, Out& out) {
    const AttendParams& attend = params_.attend;
    const Visibility& visibility = attend.visibility;
    const int head_dim = static_cast<int>(attend.heads.head_dim_v);
    const int group = static_cast<int>(group_size(visibility, attend.heads));
    const float* value_scale = params_.workspace.value_scale +
                               (row.batch * attend.heads.num_heads_k + row.head / group) * kHeadDim;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = out(accumulator_index(half, kRowOuts));
      inverse[half] = sum == 0 ? 0 : 1 / sum;
      const int64_t token = row_token(row, half);
      if (token < visibility.seqlen_q && threadIdx.x % 4 == 0) {
        attend.lse[(row.batch * visibility.num_heads + row.head) * visibility.seqlen_q + token] =
            sum == 0
                ? -INFINITY
                : (row_base_[half] - kProbabilityBits + log2f(sum)) * kLn2 + mean_score(row, half);
      }
    }
    auto columns = make_tensor<float>(Shape<Int<kRowOuts * 2>>{});
#pragma unroll
    for (int i = 0; i < kRowOuts; ++i) {
      const int column = static_cast<int>(threadIdx.x) % 4 * 2 + accumulator_column(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = accumulator_index(half, i);
        columns(at) = out(at) * inverse[half] * value_scale[column];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = row_token(row, half);
      Element* out_row = static_cast<Element*>(attend.out.data) +
                         row.batch * attend.out.batch_stride + row.head * attend.out.head_stride +
                         token * attend.out.row_stride;
      store_row(columns, half, 1.f, out_row, token < visibility.seqlen_q, head_dim,
                params_.aligned_out);
    }
  }

  __device__ float mean_score(const RowItem& row, int half) const {
    return params_.workspace.query_tiles[row.index].mean_score[row_in_block(half)];
  }
  __device__ const int8_t* query_rows() const {
    return shared_.query[queries_.slot].numbers + consumer_ * kConsumerRows * kHeadDim;
  }
  __device__ int row_in_block(int half) const {
    return consumer_ * kConsumerRows + static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 +
           threadIdx.x % 32 / 4 + half * 8;
  }
  __device__ int row_token(const RowItem& row, int half) const {
    return row.m_block * kBlockSize + row_in_block(half);
  }

  // At the tensor cores.
  __device__ void take_turn() const {
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, consumer_);
  }
  __device__ static void give_turn(int consumer) {
    cutlass::arch::NamedBarrier::arrive(kConsumerThreads, consumer);
  }

  const KernelParams<kHeadDim>& params_;
  SharedStorage& shared_;
  const int consumer_;
  RingPosition<Traits::kQuerySlots> queries_;
  RingPosition<Traits::kSlots> keys_, values_;
  int tiles_in_out_;
  bool has_sums_;         // in shared memory
  float query_scale_[2];  // of the thread's rows
  float row_base_[2];     // that the sums are relative to
  bool unseen_;           // some row of the warp has not seen a score
};

}  // namespace rrattn::cuda::sm90::quantized_attend
