// What the consumer warp groups of the gradients share: the products of a step, what is hidden from
// them, and the way back to memory.
#pragma once

#include "../../common/block_masking.cuh"
#include "../../common/softmax.cuh"
#include "grad_keys.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
class ConsumerParts {
 protected:
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<Traits::kKeys>, Int<kQueryTile>>{}));
  // dQ, of which each consumer has half the columns.
  using GradQuery = decltype(partition_fragment_C(typename Traits::GradQueryMma{},
                                                  Shape<Int<kQueryTile>, Int<Traits::kHeadDim>>{}));
  // The first operand of a product lies in registers, in the order of the scores.
  using Operand = decltype(typename Traits::GradKeyMma{}.get_thread_slice(0).partition_fragment_A(
      make_tensor(static_cast<Element*>(nullptr),
                  make_layout(Shape<Int<Traits::kKeys>, Int<kQueryTile>>{}))));
  static constexpr int kScores = kQueryTile / 4;  // of a thread, for one of its two keys

 public:
  __device__ ConsumerParts(const KernelParams& params, SharedStorage& shared, int consumer)
      : params_(params),
        shared_(shared),
        consumer_(consumer),
        thread_(static_cast<int>(threadIdx.x) - kWarpGroup),
        score_scale_(usable_scale(params.backward.softmax_scale) * kLog2E),
        hidden_(score_scale_ > 0 ? -INFINITY : INFINITY) {}

 protected:
  // Takes items until none is left. `take_steps(grads)` adds an item's steps to the gradients that
  // kTargets name, of its keys, of its values or of both.
  template <typename Grad, auto... kTargets, typename TakeSteps>
  __device__ void consume(const TakeSteps& take_steps) {
    for (RingPosition<1> items;; items.advance()) {
      shared_.item_full.wait(items.parity);
      item_ = shared_.item;
      if (item_.none_left) return;
      Grad grads[sizeof...(kTargets)];
      for (Grad& grad : grads) clear(grad);
      if (!item_.nothing_selected) {
        if (may_leave_unseen_keys(params_.backward.visibility)) clear_bad_rows();
        take_steps(grads);
      }
      shared_.item_empty.arrive();
      int consumer = consumer_;
      // Else addresses are computed ahead of the steps, and spilled.
      asm volatile("" : "+r"(consumer));
      shared_.turn_full[consumer].wait(items.parity);
      const Turn<Traits::kKeys> turn = shared_.turn[consumer];
      int i = 0;
      (add_to<Traits>(kTargets(params_), params_, turn, thread_, grads[i++]), ...);
      shared_.turn_empty[consumer].arrive();
    }
  }

  // Zeroes keys and values that hold a NaN or infinity: even times a probability of 0 it would make
  // queries NaN that do not see it. Queries that do see it are given NaN by `hide`. Also zeroes
  // keys and values that no query sees and that are so large that dP may overflow.
  __device__ void clear_bad_rows() const {
    constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
    constexpr uint32_t kInfinity = kIsBFloat16 ? 0x7f80 : 0x7c00;
    constexpr uint32_t kLarge = kIsBFloat16 ? 0x5d80 : kInfinity;      // 2^60
    constexpr int kChunks = kPanel * sizeof(Element) / sizeof(uint4);  // of a row in a panel
    constexpr int kRows = 2 * Traits::kKeys;  // keys and values, one to a thread
    static_assert(kRows <= kConsumerThreads);
    const bool has_row = kRows == kConsumerThreads || thread_ < kRows;
    const bool of_key = thread_ < Traits::kKeys;
    Element* tile = of_key ? shared_.key : shared_.value;
    const int num_chunks = (of_key ? Traits::kPanels : Traits::kValuePanels) * kChunks;
    const int row = thread_ % Traits::kKeys;
    const auto chunk = [&](int i) {
      auto* chunks = reinterpret_cast<uint4*>(tile + (i / kChunks * Traits::kKeys + row) * kPanel);
      return chunks + (i + row) % kChunks;  // threads on different banks
    };
    uint32_t largest = 0;  // magnitude: its bits sort like it
#pragma unroll 4
    for (int i = 0; has_row && i < num_chunks; ++i) {
      const uint4 four = *chunk(i);
      for (const uint32_t two : {four.x, four.y, four.z, four.w})
        largest = max(largest, max(two & 0x7fff, two >> 16 & 0x7fff));
    }
    bool not_finite = largest >= kInfinity;
    if (largest >= kLarge) {
      const BackwardParams& backward = params_.backward;
      const auto& place = item_.place;
      const bool seen =
          seen_by_group(backward.visibility, group_size(backward.visibility, backward.heads),
                        place.batch, place.key_head, place.first_key() + row);
      if (not_finite || !seen) {
        for (int i = 0; i < num_chunks; ++i) *chunk(i) = make_uint4(0, 0, 0, 0);
      }
      not_finite = not_finite && seen;
    }
    const uint32_t bits = __ballot_sync(~0u, not_finite);
    if (has_row && thread_ % 32 == 0) shared_.not_finite[thread_ / 32] = bits;
    fence_async_proxy_shared();  // wgmma reads what these stores wrote
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, 0);
    if (thread_ == 0) {
      uint32_t any = 0;
      for (const uint32_t of_a_warp : shared_.not_finite) any |= of_a_warp;
      shared_.any_not_finite = any != 0;
    }
    cutlass::arch::NamedBarrier::sync(kConsumerThreads, 0);
  }

  // Whether a key of the item or its value is not finite.
  __device__ bool is_not_finite(int key) const {
    const uint32_t* bits = shared_.not_finite + key / 32;
    return (bits[0] | bits[Traits::kKeys / 32]) >> key % 32 & 1;
  }

  // Starts result = A B of tiles in shared memory, or result += A B: the part of this consumer,
  // among those that share the product. kSteps: as start_product says.
  template <GMMA::ScaleOut kScaleOut = GMMA::ScaleOut::Zero, int kSteps = -1, typename Mma,
            typename ALayout, typename BLayout, typename Result>
  __device__ void multiply(Mma mma, int consumer, Element* a, ALayout, Element* b, BLayout,
                           Result& result) const {
    // Else descriptors are computed ahead of the loop, and spilled.
    asm volatile("" : "+r"(consumer));
    auto thread_mma = mma.get_thread_slice(consumer * kWarpGroup);
    start_product<kScaleOut, kSteps>(
        mma, thread_mma.partition_fragment_A(make_tensor(make_smem_ptr(a), ALayout{})),
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(b), BLayout{})), result);
  }

  // Starts result += A B, with A in registers and B the queries' rows.
  template <typename Mma, typename BLayout, typename Result>
  __device__ void accumulate(Mma mma, int consumer, Operand& a, Element* b, BLayout,
                             Result& result) const {
    auto thread_mma = mma.get_thread_slice(consumer * kWarpGroup);
    warpgroup_fence_operand(a);
    start_product<GMMA::ScaleOut::One>(
        mma, a, thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(b), BLayout{})), result);
  }

  // Sets the scores of each query to its number, the same for all keys.
  __device__ static void start_from(const float* of_query, Scores& scores) {
    const auto first = static_cast<uint32_t>(__cvta_generic_to_shared(of_query + column(0)));
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      float pair[2];
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(pair[0]), "=f"(pair[1])
                   : "r"(first + accumulator_column(i) * 4)
                   : "memory");
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scores(accumulator_index(half, i)) = pair[0];
        scores(accumulator_index(half, i + 1)) = pair[1];
      }
    }
  }

  // Turns scores of a step into probabilities. `masked`: some may be hidden.
  __device__ void softmax(const QueryStep& step, bool masked, Scores& scores,
                          Operand& probabilities) const {
    warpgroup_fence_operand(scores);
    if (masked) hide(step, scores);
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = exp2_approx(scores(i) * score_scale_);
      probabilities(i) = static_cast<Element>(scores(i));
      all ^= __float_as_uint(scores(i));
    }
    compute_here(__uint_as_float(all));  // while dP is computed; below 2, as each of them is
  }

  // Gives hidden scores a probability of 0, and makes visible ones NaN where the key or its value
  // is not finite.
  __device__ void hide(const QueryStep& step, Scores& scores) const {
    const auto& place = item_.place;
    const Visibility& visibility = params_.backward.visibility;
    const RowBounds& layout = visibility.row_bounds;
    const int first_query = step.first_query + column(0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = place.first_key() + key_row() + half * 8;
      const int first_seeing = key >= visibility.seqlen_k ? INT_MAX
                               : visibility.causal ? key - static_cast<int>(visibility.shift())
                                                   : INT_MIN;
      if (shared_.any_not_finite && is_not_finite(key_row() + half * 8)) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          float& score = scores(accumulator_index(half, i));
          if (score != hidden_) score = NAN;  // not for queries past the end or that see nothing
        }
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (first_query + accumulator_column(i) < first_seeing)
          scores(accumulator_index(half, i)) = hidden_;
      }
      if (!step.bounded || key >= visibility.seqlen_k) continue;
      const KeyBounds bounds = load_key_bounds(
          layout, visibility.causal,
          row_bounds_of(layout, place.batch, visibility.bounds_head(step.head)), key);
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (bounds.mask(first_query + accumulator_column(i)))
          scores(accumulator_index(half, i)) = hidden_;
      }
    }
  }

  // Stores dS^T as the first operand of dQ, the queries of a key side by side. A lane gives the
  // place of 8 queries; the swizzle flips the bits of the address that count such chunks.
  __device__ void store_transposed(const Operand& operand, Element* to) const {
    static_assert(kQueryTile == kPanel);
    const int lane = thread_ % 32;
    const uint32_t first = static_cast<uint32_t>(__cvta_generic_to_shared(
        to + typename Traits::ScoreOffsets{}(lane / 16 * 8, key_of_warp() + lane % 16)));
    const auto* words = reinterpret_cast<const uint32_t*>(&operand(0));
#pragma unroll
    for (int i = 0; i < kQueryTile / 16; ++i) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       first ^ static_cast<uint32_t>(i * 16 * sizeof(Element))),
                   "r"(words[i * 4]), "r"(words[i * 4 + 1]), "r"(words[i * 4 + 2]),
                   "r"(words[i * 4 + 3])
                   : "memory");
    }
  }

  // The query, within the tile, of score i of either of the thread's keys.
  __device__ static int column(int i) {
    return static_cast<int>(threadIdx.x) % 4 * 2 + accumulator_column(i);
  }

  // The warp's first key of the item's: each consumer has other keys, or all have the same.
  __device__ int key_of_warp() const { return thread_ % kThreadsOfKeys<Traits> / 32 * 16; }
  // The thread's first key of the item's, and its first row in the query tile; its second is 8
  // further on.
  __device__ int key_row() const { return key_row_of<Traits>(thread_); }
  __device__ int tile_row() const { return thread_ % kWarpGroup / 32 * 16 + thread_ % 32 / 4; }

  const KernelParams& params_;
  SharedStorage& shared_;
  Item<Traits::kKeys> item_;  // in registers: in shared memory it costs the loop a twentieth more
                              // instructions, which move descriptors
  const int consumer_;
  const int thread_;  // of both consumers
  const float score_scale_;
  const float hidden_;  // a score whose probability is 0
};

}  // namespace rrattn::cuda::sm90::backward
