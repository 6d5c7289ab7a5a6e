// A consumer warp group of attention in eight bits: 64 rows of a query block, against the tiles that
// the producer brings. It works as that of ../attend/consumer.cuh: the tensor cores multiply the
// previous tile's probabilities by its values while the softmax of a tile is computed, and the two
// consumers take turns at them.
//
// The base of a row is what its query and the keys' variance let expect, from kHeadroom to
// kLargestHeadroom above its largest score, rounded up, in the first tile in which it sees anything: that
// may be of one key. Later tiles need no maximum: probabilities may grow past 256 up to the largest
// number of e4m3. A warp in which one has come so far raises the bases of the rows concerned, which is
// rare. Bases are whole, so that no base changes the rounding of a probability, but of small ones.
//
// The tensor cores cut each e4m3 product to about 13 bits below the largest and below what is summed up
// so far: over many tiles most would be lost. So out is summed up in float32 here, tile by tile. Columns
// of ones behind those of the values have the second product add up the rounded probabilities of each
// row as well, each for 16 positions.
#pragma once

#include "config.cuh"
// config.cuh comes first
#include "../../common/softmax.cuh"
#include "../../common/store_row.cuh"
#include "../common/wgmma.cuh"
#include "e4m3.cuh"
#include "producer.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

constexpr float kProbabilityBits = 8;  // kProbabilityScale is 2 to this
static_assert(kProbabilityScale == 1 << 8);
// 256 times 2 to this is about the largest number of e4m3, 448.
constexpr float kLargestOverBase = 0.8f;

// kUnseenKeys: whether some blocks may hold keys that no row sees.
template <typename Traits, bool kUnseenKeys>
class Consumer {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  static constexpr int kHeadDim = Traits::kHeadDim;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<kConsumerRows>, Int<kBlockSize>>{}));
  using TileOut = decltype(partition_fragment_C(
      typename Traits::OutMma{}, Shape<Int<kConsumerRows>, Int<Traits::kOutColumns>>{}));
  static constexpr int kRowScores = kBlockSize / 4;  // of a row, in one thread
  static constexpr int kRowOuts = kHeadDim / 4;
  using Out = decltype(make_tensor<float>(Shape<Int<2 * kRowOuts>>{}));
  // The first operand of the second product: registers, four for each 32 keys.
  using Probabilities = decltype(make_tensor<uint32_t>(Shape<_4, _1, Int<kBlockSize / 32>>{}));

 public:
  __device__ Consumer(const KernelParams<kHeadDim>& params, SharedStorage& shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer) {
    if (consumer == 1) give_turn(0);
  }

  __device__ void consume_rows() {
    // What rarely is needed of rows and tiles stays in shared memory: registers have no room for it.
    for (RingPosition<Traits::kRowSlots> rows;; rows.advance()) {
      shared_.row_full[rows.slot].wait(rows.parity);
      const RowItem& row = shared_.row[rows.slot];
      if (row.index < 0) return;
      Out out;
      clear(out);
      row_base_[0] = row_base_[1] = -INFINITY;
      row_sum_[0] = row_sum_[1] = 0;
      unseen_ = true;
      if (!row.without_tiles) attend(row, out);
      row_sum_[0] = quad_sum(row_sum_[0]);
      row_sum_[1] = quad_sum(row_sum_[1]);
      // Any score of the mean key would do for a row without tiles: its sink loses it, lse gets it back.
      float mean_score[2] = {0, 0};
      if (!row.without_tiles) {
        mean_score[0] = shared_.query[queries_.slot].mean_score[row_in_block(0)];
        mean_score[1] = shared_.query[queries_.slot].mean_score[row_in_block(1)];
        release_query();
      }
      if (params_.attend.sink != nullptr) add_sink(row, mean_score, out);
      write(row, mean_score, out);
      shared_.row_empty[rows.slot].arrive();
    }
  }

 private:
  // Scores of a query and a key with scales of this product are below 2^22, where floats have halves.
  static constexpr float kSteepScale = 1;

  // What is added to scale * score_as_float(score) for the exponent of a probability. The scale has 16
  // bits, its product with kWhole 18, which bases of scores that it is not too steep for join exactly.
  __device__ static float exponent_shift(float scale, float base) {
    return kProbabilityBits - base - (Traits::kFloatScores ? Traits::kWhole * scale : 0.f);
  }

  __device__ void attend(const RowItem& row, Out& out) {
    shared_.query_full[queries_.slot].wait(queries_.parity);
    float largest_scale = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = shared_.query[queries_.slot].scale[row_in_block(half)];
      query_scale_[half] = isnan(scale) ? 0 : scale;  // until the end
      largest_scale = fmaxf(largest_scale, fabsf(query_scale_[half]));
    }
#pragma unroll
    for (int lanes = 16; lanes >= 4; lanes /= 2)
      largest_scale = fmaxf(largest_scale, __shfl_xor_sync(~0u, largest_scale, lanes));
    steep_key_scale_ = kSteepScale / largest_scale;

    Scores scores;
    Probabilities probabilities;
    TileOut tile_out;
    shared_.key_full[keys_.slot].wait(keys_.parity);
    const TileNote note = shared_.note[keys_.slot];
    const float scale = key_scale();
    take_turn();
    multiply_keys(scores);
    give_turn(1 - consumer_);
    await_next(note.last, values_);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    exponentiate_any(row, note, scale, scores, probabilities, out);
    release_key();
    bool last = note.last;
    while (!last) last = take_tile(row, scores, probabilities, tile_out, out);
    multiply_values(probabilities, tile_out);
    finish_values(tile_out, out);
    spoil_bad_rows(out);
  }

  // The products with the next tile, and its softmax while those of the last tile's probabilities
  // with its values are under way. Returns whether it is the row's last.
  __device__ __forceinline__ bool take_tile(const RowItem& row, Scores& scores,
                                            Probabilities& probabilities, TileOut& tile_out,
                                            Out& out) {
    const TileNote note = shared_.note[keys_.slot];
    const float scale = key_scale();
    take_turn();
    multiply_keys(scores);
    multiply_values(probabilities, tile_out);
    give_turn(1 - consumer_);
    const bool plain = note.plain && !unseen_ && scale < steep_key_scale_;
    RingPosition<Traits::kValueSlots> values = values_;
    values.advance();
    await_next(note.last, values);
    warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    bool done = plain;
    if (plain) {
      exponentiate_plain(scale, scores);
      const uint32_t saturated =
          convert(scores, probabilities, [&] { finish_values(tile_out, out); });
      if (__any_sync(~0u, (saturated & 0x80808080) != 0)) {
        done = lower_probabilities(scores, probabilities, out);
        if (!done) multiply_keys_again(scores);
      }
    } else {
      finish_values(tile_out, out);
    }
    if (!done) exponentiate_any(row, note, scale, scores, probabilities, out);
    release_key();
    return note.last;
  }

  // Waits for the tile of keys behind the current one, unless this is the last, and for its values.
  __device__ void await_next(bool last, const RingPosition<Traits::kValueSlots>& values) {
    if (!last) {
      RingPosition<Traits::kKeySlots> keys = keys_;
      keys.advance();
      shared_.key_full[keys.slot].wait(keys.parity);
    }
    shared_.value_full[values.slot].wait(values.parity);
  }

  // Waits for P V, releases the values, and adds it to out and to the sums of the rows.
  __device__ void finish_values(TileOut& tile_out, Out& out) {
    warpgroup_wait<0>();
    warpgroup_fence_operand(tile_out);
    if (threadIdx.x % 32 == 0) shared_.value_empty[values_.slot].arrive();
    values_.advance();
#pragma unroll
    for (int i = 0; i < size(out); ++i) out(i) += tile_out(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum_[half] += tile_out(accumulator_index(half, kRowOuts)) +
                        tile_out(accumulator_index(half, kRowOuts + 1));
    }
  }

  // Rows whose query is not finite become NaN, where they see anything.
  __device__ void spoil_bad_rows(Out& out) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = shared_.query[queries_.slot].scale[row_in_block(half)];
      factor[half] = isnan(scale) && row_base_[half] != -INFINITY ? NAN : 1;
      row_sum_[half] *= factor[half];
    }
    scale_rows(out, factor);
  }

  // Starts scores = Q K^T of the current slot.
  __device__ void multiply_keys(Scores& scores) {
    if constexpr (Traits::kFloatScores) fill(scores, __float_as_int(Traits::kWhole));
    typename Traits::ScoreMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    start_product<Traits::kFloatScores ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero>(
        mma,
        thread_mma.partition_fragment_A(
            make_tensor(make_smem_ptr(query_rows()), typename Traits::QueryLayout{})),
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(shared_.key[keys_.slot].numbers),
                                                    typename Traits::KeyLayout{})),
        scores);
  }

  // Starts tile_out = P V of the current slot.
  __device__ void multiply_values(Probabilities& probabilities, TileOut& tile_out) {
    typename Traits::OutMma mma;
    auto thread_mma = mma.get_thread_slice(threadIdx.x % kWarpGroup);
    const auto* values =
        reinterpret_cast<const float_e4m3_t*>(shared_.value[values_.slot].tile.numbers);
    warpgroup_fence_operand(probabilities);
    start_product<GMMA::ScaleOut::Zero>(mma, probabilities,
                                        thread_mma.partition_fragment_B(make_tensor(
                                            make_smem_ptr(values), typename Traits::ValueLayout{})),
                                        tile_out);
  }

  __device__ void release_key() {
    __syncwarp();  // tells the compiler that all its threads have the same positions: fewer instructions
    shared_.key_empty[keys_.slot].arrive();
    keys_.advance();
  }

  __device__ void release_query() {
    shared_.query_empty[queries_.slot].arrive();
    queries_.advance();
  }

  // Probabilities of any tile, where bases may have to rise.
  __device__ __forceinline__ void exponentiate_any(const RowItem& row, const TileNote& note,
                                                   float key_scale, Scores& scores,
                                                   Probabilities& probabilities, Out& out) {
    uint32_t hidden[2] = {0, 0};
    if (!note.plain) {
      find_hidden<kUnseenKeys, kRowScores>(
          params_.attend.visibility, row, note.first_key, note.bounded,
          [&](int half) { return row_token(row, half); }, hidden);
    }
    const float scale[2] = {query_scale_[0] * key_scale, query_scale_[1] * key_scale};
    const float largest[2] = {largest_score(scores, 0, scale[0], hidden[0]),
                              largest_score(scores, 1, scale[1], hidden[1])};
    float factor[2];
    raise_bases(largest, factor, out);
    unseen_ = __any_sync(~0u, row_base_[0] == -INFINITY || row_base_[1] == -INFINITY);
    const bool steep = !(key_scale < steep_key_scale_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = finite(row_base_[half]);
      const float shift = exponent_shift(scale[half], base);
#pragma unroll
      for (int i = 0; i < kRowScores; ++i) {
        int& score = scores(accumulator_index(half, i));
        // If not steep as exponentiate_plain, whichever of the two the other rows of the warp ask for.
        const float exponent =
            steep ? __fadd_rn(__fsub_rn(__fmul_rn(number_of(score), scale[half]), base),
                              kProbabilityBits)
                  : fmaf(score_as_float(score), scale[half], shift);
        score = hidden[half] >> i & 1 ? 0 : __float_as_int(exp2_approx(exponent));
      }
    }
    convert(scores, probabilities, [] {});
  }

  // Turns scores into the bits of probabilities in float32. No score is hidden, and all are small
  // enough for one multiply-add to subtract the base.
  __device__ __forceinline__ void exponentiate_plain(float key_scale, Scores& scores) const {
    const float scale[2] = {query_scale_[0] * key_scale, query_scale_[1] * key_scale};
    const float shift[2] = {exponent_shift(scale[0], row_base_[0]),
                            exponent_shift(scale[1], row_base_[1])};
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int& score = scores(accumulator_index(half, i));
        score = __float_as_int(exp2_approx(fmaf(score_as_float(score), scale[half], shift[half])));
      }
    }
  }

  // Probabilities of a plain tile of which some are above the largest number of e4m3: floats still have
  // them, so that those of rows whose bases rise are brought to the new ones. Returns false, and does
  // nothing, where some are above the largest float too.
  __device__ __forceinline__ bool lower_probabilities(Scores& scores, Probabilities& probabilities,
                                                      Out& out) {
    float largest[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p = 0;
#pragma unroll
      for (int i = 0; i < kRowScores; ++i)
        p = fmaxf(p, __int_as_float(scores(accumulator_index(half, i))));
      largest[half] = row_base_[half] - kProbabilityBits + log2f(quad_max(p));
    }
    if (__any_sync(~0u, largest[0] == INFINITY || largest[1] == INFINITY)) return false;
    raise_bases(largest, factor, out);
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int& score = scores(accumulator_index(half, i));
        score = __float_as_int(__int_as_float(score) * factor[half]);
      }
    }
    convert(scores, probabilities, [] {});
    return true;
  }

  // Gives rows that have seen nothing before a base, raises those of rows whose largest score gives a
  // probability above the largest number of e4m3, whatever the other rows of the warp do, and brings
  // all that was summed up to them, by the factor.
  __device__ void raise_bases(const float (&largest)[2], float (&factor)[2], Out& out) {
    float least[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float expected = shared_.query[queries_.slot].base[row_in_block(half)];
      const float above = ceilf(largest[half]);
      least[half] =
          largest[half] > row_base_[half] + kLargestOverBase
              ? fminf(fmaxf(expected, above + Traits::kHeadroom), above + Traits::kLargestHeadroom)
              : row_base_[half];
    }
    raise_bases_to(least, factor);
    scale_rows(out, factor);
  }

  // Raises the bases to at least these, and finds what brings sums to the new ones.
  __device__ void raise_bases_to(const float (&least)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = fmaxf(row_base_[half], least[half]);
      factor[half] = exp2_approx(row_base_[half] - finite(base));
      row_base_[half] = base;
      row_sum_[half] *= factor[half];
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
  __device__ void add_sink(const RowItem& row, const float (&mean_score)[2], Out& out) {
    float score[2], least[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      score[half] = (params_.attend.sink[row.head] - mean_score[half]) * kLog2E;
      least[half] = ceilf(score[half]);
    }
    raise_bases_to(least, factor);
    scale_rows(out, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row_sum_[half] += exp2_approx(score[half] - finite(row_base_[half]) + kProbabilityBits);
  }

  // The largest visible score of a row.
  __device__ static float largest_score(const Scores& scores, int half, float scale,
                                        uint32_t hidden) {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
      const float score = number_of(scores(accumulator_index(half, i))) * scale;
      largest = fmaxf(largest, hidden >> i & 1 ? -INFINITY : score);
    }
    return quad_max(largest);
  }

  // The scores of one warp, by its own products: those of the warp group (wgmma) need all four
  // warps.
  __device__ void multiply_keys_again(Scores& scores) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int8_t* query =
        query_rows() + static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 * kHeadDim;
    const int8_t* key = shared_.key[keys_.slot].numbers;
    fill(scores, Traits::kFloatScores ? __float_as_int(Traits::kWhole) : 0);
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

  // Rounds probabilities to e4m3: of each 32 keys, of the first 16 both rows, then of the others. In
  // the result the upper bit of a byte is set where one has become the largest number of e4m3, 0x7e.
  // `before_writing` waits for what still reads the probabilities.
  template <typename BeforeWriting>
  __device__ __forceinline__ static uint32_t convert(const Scores& scores,
                                                     Probabilities& probabilities,
                                                     const BeforeWriting& before_writing) {
    uint16_t twos[kRowScores];
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
      const auto p = [&](int e) {
        return __int_as_float(scores(accumulator_index(i / 2 % 2, i / 4 * 4 + i % 2 * 2 + e)));
      };
      twos[i] = to_e4m3(p(0), p(1));
    }
    before_writing();
    uint32_t saturated = 0;
#pragma unroll
    for (int i = 0; i < kRowScores / 2; ++i) {
      const uint32_t word = join(twos[i * 2], twos[i * 2 + 1]);
      probabilities(i) = word;
      saturated |= word + 0x02020202;
    }
    return saturated;
  }

  // A score, a whole number below 2^22, which floats have exactly; with kFloatScores plus kWhole.
  __device__ static float score_as_float(int score) {
    return Traits::kFloatScores ? __int_as_float(score) : static_cast<float>(score);
  }
  __device__ static float number_of(int score) {
    return score_as_float(score) - (Traits::kFloatScores ? Traits::kWhole : 0.f);
  }

  __device__ float key_scale() const { return shared_.key[keys_.slot].scale; }

  __device__ static float finite(float base) { return base == -INFINITY ? 0 : base; }

  // Divides by the row sums and writes out and lse.
  __device__ void write(const RowItem& row, const float (&mean_score)[2], Out& out) {
    const AttendParams& attend = params_.attend;
    const Visibility& visibility = attend.visibility;
    const int head_dim = static_cast<int>(attend.heads.head_dim_v);
    const int group = static_cast<int>(group_size(visibility, attend.heads));
    const float* value_scale = params_.workspace.value_scale +
                               (row.batch * attend.heads.num_heads_k + row.head / group) * kHeadDim;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum_[half];
      inverse[half] = sum == 0 ? 0 : 1 / sum;
      const int64_t token = row_token(row, half);
      if (token < visibility.seqlen_q && threadIdx.x % 4 == 0) {
        attend.lse[(row.batch * visibility.num_heads + row.head) * visibility.seqlen_q + token] =
            sum == 0 ? -INFINITY
                     : (row_base_[half] - kProbabilityBits + log2f(sum)) * kLn2 + mean_score[half];
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
  RingPosition<Traits::kKeySlots> keys_;
  RingPosition<Traits::kValueSlots> values_;
  float query_scale_[2];   // of the thread's rows
  float steep_key_scale_;  // from which on scores may have no place for fractions
  float row_base_[2];      // that the sums are relative to
  float row_sum_[2];       // of the thread's columns of ones
  bool unseen_;            // some row of the warp has not seen a score
};

}  // namespace rrattn::cuda::sm90::quantized_attend
