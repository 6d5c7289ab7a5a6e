// The rows of a warp of the estimate: their queries, the scores of these against tiles of 64 pooled
// keys, the exponentials, and the sums of these over key blocks.
#pragma once

#include <utility>

#include "../../common/rows.cuh"
#include "../common/thread_here.cuh"
#include "block_sums.cuh"

namespace rrattn::cuda::sm80::estimate {

constexpr float kOutgrown = 0x1p100f;  // a row sum from here on asks for the exact maximum

template <typename Traits, int kKeyStride>
class WarpRows {
  using Element = typename Traits::Element;
  using Sums = BlockSums<kKeyStride>;
  static constexpr int kFragments = Traits::kFragments;
  static constexpr int kRows = 2 * kFragments;  // of a thread: row g + 8 r of its warp's
  static constexpr int kColumnGroups = Traits::kHeadDim / 32;
  using Scores = float[kFragments][2 * kThreadStrides];

 public:
  __device__ WarpRows(const EstimateParams& params, const WorkLayout& layout,
                      const Workspace<Traits>& workspace,
                      const typename Traits::SharedStorage& shared)
      : params_(params), layout_(layout), workspace_(workspace), shared_(shared) {}

  // Reads the queries of the item.
  __device__ void begin_item(bool aligned) {
    const RowTile& rows = this->rows();
    const auto* queries = static_cast<const Element*>(params_.query.data) +
                          shared_.item.batch * params_.query.batch_stride +
                          rows.head * params_.query.head_stride;
    for_each(std::make_integer_sequence<int, kRows>(), [&](auto row) {
      constexpr int r = decltype(row)::value;
      const int64_t token = row_token(r);
      const bool exists = rows.active && token < params_.visibility.seqlen_q;
      float square = 0;
      for_each(std::make_integer_sequence<int, kColumnGroups>(), [&](auto group) {
        constexpr int c = decltype(group)::value;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (exists) {
          eight = load_eight(queries + token * params_.query.row_stride, c * 32 + quad_lane() * 8,
                             static_cast<int>(params_.heads.head_dim), aligned);
        }
        query_[r][c] = eight;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float q = element<Element>(eight, e);
          square = fmaf(q, q, square);
        }
      });
      variance_weight_[r] = layout_.variance_weight * quad_sum(square);
      reference_[r] = -INFINITY;
    });
    int limit = row_limit(0);
#pragma unroll
    for (int r = 1; r < kRows; ++r) limit = min(limit, row_limit(r));
    warp_limit_ = __reduce_min_sync(~0u, limit);
  }

  __device__ void begin_sums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_sum_[r] = 0;
  }

  // Adds a tile's exponentials to the row sums, and writes those of each key block to memory; with
  // `maximum`, only finds the maximum.
  __device__ __forceinline__ void take_tile(int tile, int slot, bool maximum) {
    Scores scores;
    multiply(slot, scores);
    if (params_.sampling.spread > 0) add_spread(slot, scores);
    if ((tile + 1) * kTileStrides > warp_limit_ || params_.visibility.row_bounds.data != nullptr) {
      hide(tile, scores);
    }
    bool unseen = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) unseen |= reference_[r] == -INFINITY;
    if (maximum || __any_sync(~0u, unseen)) raise_references(scores, maximum);
    if (maximum) return;
    float* to = workspace_.sums_of(row(0)) + tile * Sums::kTileSums;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float minus_reference = reference_[r] == -INFINITY ? 0.f : -reference_[r];
      float sums[Sums::kOwn];
#pragma unroll
      for (int block = 0; block < Sums::kOwn; ++block) {
#pragma unroll
        for (int i = 0; i < Sums::kOwnStrides; ++i) {
          const float score = at(scores, r, block * Sums::kOwnStrides + i);
          const float exponential = exp2_approx(fmaf(score, layout_.score_scale, minus_reference));
          sums[block] = i == 0 ? exponential : sums[block] + exponential;
        }
        row_sum_[r] += sums[block];
      }
      Sums::store(sums, to + r * 8 * workspace_.row_sums);
    }
  }

  __device__ void end_sums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_sum_[r] = quad_sum(row_sum_[r]);
  }

  // Whether later scores of a row are so much larger than its reference that the sums do not fit.
  __device__ bool outgrown() const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) any |= row_sum_[r] >= kOutgrown;
    return any;
  }

  // Writes 1 / the sum of each row.
  __device__ void write_factors(float* row_factor) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = row_sum_[r] + sink_term(r);
      if (quad_lane() == 0) row_factor[row(r)] = sum == 0 ? 0 : 1 / sum;
    }
  }

 private:
  // Stride i of the thread's 16, of its row r.
  __device__ static float& at(Scores& scores, int r, int i) {
    return scores[r / 2][accumulator_index(r % 2, i)];
  }

  // Calls `use` with each number as a constant: a loop as large as that of the queries' loads is
  // not unrolled, and without constant indices the queries would not lie in registers.
  template <int... kNumbers, typename Use>
  __device__ static __forceinline__ void for_each(std::integer_sequence<int, kNumbers...>,
                                                  const Use& use) {
    (use(std::integral_constant<int, kNumbers>()), ...);
  }

  // The products of the warp's queries with the keys in a slot.
  __device__ void multiply(int slot, Scores& scores) const {
    const auto* keys = reinterpret_cast<const uint4*>(shared_.slots.key[slot]) + threadIdx.x % 32;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int i = 0; i < 2 * kThreadStrides; ++i) scores[f][i] = 0;
    }
    constexpr int kTogether = 4;  // groups of 8 keys, so that products that wait for others are few
#pragma unroll
    for (int c = 0; c < kColumnGroups; ++c) {
#pragma unroll
      for (int first = 0; first < kTileStrides / 8; first += kTogether) {
        uint4 key[kTogether];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) key[n] = keys[((first + n) * kColumnGroups + c) * 32];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const uint4 &upper = query_[2 * f][c], &lower = query_[2 * f + 1][c];
            multiply_add(scores[f] + (first + n) * 4, upper.x, lower.x, upper.y, lower.y, key[n].x,
                         key[n].y);
          }
        }
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const uint4 &upper = query_[2 * f][c], &lower = query_[2 * f + 1][c];
            multiply_add(scores[f] + (first + n) * 4, upper.z, lower.z, upper.w, lower.w, key[n].z,
                         key[n].w);
          }
        }
      }
    }
  }

  __device__ static void multiply_add(float* sum, uint32_t a0, uint32_t a1, uint32_t a2,
                                      uint32_t a3, uint32_t b0, uint32_t b1) {
    Traits::Mma::fma(sum[0], sum[1], sum[2], sum[3], a0, a1, a2, a3, b0, b1, sum[0], sum[1], sum[2],
                     sum[3]);
  }

  // Adds to the products what the variances within the strides add to the scores.
  __device__ void add_spread(int slot, Scores& scores) const {
    const auto* variances =
        reinterpret_cast<const float4*>(shared_.slots.variance[slot]) + quad_lane();
#pragma unroll
    for (int i = 0; i < kThreadStrides; i += 4) {
      const float4 four = variances[i];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto add = [&](int j, float variance) {
          float& score = at(scores, r, i + j);
          score = fmaf(variance_weight_[r], variance, score);
        };
        add(0, four.x), add(1, four.y), add(2, four.z), add(3, four.w);
      }
    }
  }

  // Makes the largest score so far the reference of each row that has none yet; with `maximum`, of
  // the rows that have outgrown theirs. The others keep it, so that their bits do not depend on
  // what else is in the item.
  __device__ void raise_references(Scores& scores, bool maximum) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kThreadStrides; ++i) {
        largest = fmaxf(largest, at(scores, r, i) * layout_.score_scale);
      }
      largest = quad_max(largest);
      if (maximum ? row_sum_[r] >= kOutgrown : reference_[r] == -INFINITY) {
        reference_[r] = fmaxf(reference_[r], largest);
      }
    }
  }

  // Gives what the rows do not see the score that comes to -infinity when scaled.
  __device__ void hide(int tile, Scores& scores) const {
    const int first = tile * kTileStrides + quad_lane() * kThreadStrides;
    uint32_t hidden[kRows];  // bit i: stride i of the thread's 16
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int seen = row_limit(r) - first;
      hidden[r] = seen <= 0 ? ~0u : seen >= kThreadStrides ? 0 : ~0u << seen;
    }
    const Visibility& visibility = params_.visibility;
    const RowTile& rows = this->rows();
    const int batch = shared_.item.batch;
    if (visibility.row_bounds.data != nullptr && rows.active &&
        span_bounds_of(visibility, kKeyStride * kTileStrides, workspace_.tile_bounds, batch,
                       rows.head)[tile]
            .meets(rows.first_token, rows.last_token)) {
      const SpanBounds* stride_bounds =
          span_bounds_of(visibility, kKeyStride, workspace_.stride_bounds, batch, rows.head);
      const int end = min(kThreadStrides, layout_.num_strides - first);
#pragma unroll 2
      for (int i = 0; i < end; ++i) {
        const SpanBounds bounds = stride_bounds[first + i];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int token = row_token(r);
          if (bounds.hides(token, token)) hidden[r] |= 1u << i;
        }
      }
    }
    const float hidden_score = layout_.score_scale < 0 ? INFINITY : -INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kThreadStrides; ++i) {
        if (hidden[r] >> i & 1) at(scores, r, i) = hidden_score;
      }
    }
  }

  // What the sink adds to the sum of a row, a stride of keys counting as one. Where it is infinite,
  // scores are too small for a float.
  __device__ float sink_term(int r) const {
    if (params_.sink == nullptr || !rows().active) return 0;
    const float reference = reference_[r] == -INFINITY ? 0 : reference_[r];
    const float sink = params_.sink[rows().head] * kLog2E;
    return exp2_approx(sink - log2f(static_cast<float>(kKeyStride)) - reference);
  }

  __device__ static int first_row_of(int thread) { return thread / 32 * Traits::kWarpRows; }
  __device__ static int quad_lane() { return threadIdx.x % 4; }
  // The thread's row r in the item.
  __device__ static int row(int r) {
    const int thread = thread_here();
    return first_row_of(thread) + thread % 32 / 4 + r * 8;
  }
  __device__ const RowTile& rows() const {
    return shared_.item.rows[first_row_of(static_cast<int>(threadIdx.x)) / kTileQueries];
  }

  __device__ int row_token(int r) const {
    return rows().first_token + row(r) % kTileQueries * static_cast<int>(params_.sampling.stride);
  }

  // How many strides a row may see under the diagonal and before the end of the sequence.
  __device__ int row_limit(int r) const {
    const int token = row_token(r);
    return rows().active && token < params_.visibility.seqlen_q
               ? visible_strides<kKeyStride>(params_.visibility, layout_, token)
               : 0;
  }

  const EstimateParams& params_;
  const WorkLayout& layout_;
  const Workspace<Traits>& workspace_;
  const typename Traits::SharedStorage& shared_;
  uint4 query_[kRows][kColumnGroups];  // eight columns of each 32, as in KeyTile
  float variance_weight_[kRows];       // what a variance of 1 adds to a product
  float reference_[kRows], row_sum_[kRows];
  int warp_limit_;  // how many strides all rows of the warp may see
};

}  // namespace rrattn::cuda::sm80::estimate
