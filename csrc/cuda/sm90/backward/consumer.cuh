// A consumer warp group of the gradients: 64 keys, against the queries that the producer brings.
//
//   S^T = K Q^T - lse / scale,  P = exp(scale S),  dP^T = V dO^T - delta,  dS = P dP
//   dV += P^T dO,  dK += dS^T Q,  dQ = dS K
//
// Every thread arrives at the barriers, since racecheck understands no others.
//
// dQ comes a step late, so that neither consumer waits for the other, and goes to the sums through
// shared memory, which is faster than from registers. Figures of these and other variants are in
// docs/tuning.md.
#pragma once

#include "../../common/block_masking.cuh"
#include "../../common/softmax.cuh"
#include "../../common/store_row.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
class Consumer {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Step = typename SharedStorage::Step;
  using Scores = decltype(partition_fragment_C(typename Traits::ScoreMma{},
                                               Shape<Int<kBlockSize>, Int<kQueryTile>>{}));
  using GradKey = decltype(partition_fragment_C(typename Traits::GradKeyMma{},
                                                Shape<Int<kBlockSize>, Int<Traits::kHeadDim>>{}));
  using GradQuery = decltype(partition_fragment_C(typename Traits::GradQueryMma{},
                                                  Shape<Int<kQueryTile>, Int<Traits::kHeadDim>>{}));
  // The first operand of a product lies in registers, in the order of the scores.
  using Operand =
      decltype(typename Traits::GradKeyMma{}.get_thread_slice(0).partition_fragment_A(make_tensor(
          static_cast<Element*>(nullptr), make_layout(Shape<Int<kBlockSize>, Int<kQueryTile>>{}))));
  static constexpr int kScores = kQueryTile / 4;  // of a thread, for one of its two keys

 public:
  __device__ Consumer(const KernelParams& params, SharedStorage& shared, int consumer)
      : params_(params),
        shared_(shared),
        consumer_(consumer),
        thread_(static_cast<int>(threadIdx.x) - kWarpGroup),
        score_scale_(usable_scale(params.backward.softmax_scale) * kLog2E),
        hidden_(score_scale_ > 0 ? -INFINITY : INFINITY) {}

  __device__ void consume_items() {
    for (RingPosition<1> items;; items.advance()) {
      shared_.item_full.wait(items.parity);
      const auto item = shared_.item;
      if (item.index < 0) break;
      const Place place(params_, item.index);
      GradKey grad_key, grad_value;
      clear(grad_key);
      clear(grad_value);
      if (!item.nothing_selected) {
        if (may_leave_unseen_keys(params_.backward.visibility)) clear_bad_rows(place);
        take_steps(place, grad_key, grad_value);
      }
      shared_.item_empty.arrive();
      const BackwardParams& backward = params_.backward;
      store(place, grad_key, backward.softmax_scale, backward.grad_key, backward.heads.head_dim,
            params_.aligned_grad_key);
      store(place, grad_value, 1, backward.grad_value, backward.heads.head_dim_v,
            params_.aligned_grad_value);
    }
    shared_.sums_empty.wait(sums_.parity ^ 1);
    shared_.sums_full.arrive();  // the writer finds that no step is left
  }

 private:
  // Zeroes keys and values that hold a NaN or infinity: even times a probability of 0 it would make
  // queries NaN that do not see it. Queries that do see it are given NaN by `hide`. Also zeroes
  // keys and values that no query sees and that are so large that dP may overflow.
  __device__ void clear_bad_rows(const Place& place) const {
    constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
    constexpr uint32_t kInfinity = kIsBFloat16 ? 0x7f80 : 0x7c00;
    constexpr uint32_t kLarge = kIsBFloat16 ? 0x5d80 : kInfinity;      // 2^60
    constexpr int kChunks = kPanel * sizeof(Element) / sizeof(uint4);  // of a row in a panel
    static_assert(kConsumerThreads == 2 * kBlockSize);  // each thread has a key or a value
    Element* tile = thread_ < kBlockSize ? shared_.key : shared_.value;
    const int row = thread_ % kBlockSize;
    const auto chunk = [&](int i) {
      auto* chunks = reinterpret_cast<uint4*>(tile + (i / kChunks * kBlockSize + row) * kPanel);
      return chunks + (i + row) % kChunks;  // threads on different banks
    };
    uint32_t largest = 0;  // magnitude: its bits sort like it
#pragma unroll 4
    for (int i = 0; i < Traits::kPanels * kChunks; ++i) {
      const uint4 four = *chunk(i);
      for (const uint32_t two : {four.x, four.y, four.z, four.w})
        largest = max(largest, max(two & 0x7fff, two >> 16 & 0x7fff));
    }
    bool not_finite = largest >= kInfinity;
    if (largest >= kLarge) {
      const BackwardParams& backward = params_.backward;
      const bool seen =
          seen_by_group(backward.visibility, group_size(backward.visibility, backward.heads),
                        place.batch, place.key_head, place.n_block * kBlockSize + row);
      if (not_finite || !seen) {
        for (int i = 0; i < Traits::kPanels * kChunks; ++i) *chunk(i) = make_uint4(0, 0, 0, 0);
      }
      not_finite = not_finite && seen;
    }
    const uint32_t bits = __ballot_sync(~0u, not_finite);
    if (thread_ % 32 == 0) shared_.not_finite[thread_ / 32] = bits;
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
    return (bits[0] | bits[kBlockSize / 32]) >> key % 32 & 1;
  }

  __device__ void take_steps(const Place& place, GradKey& grad_key, GradKey& grad_value) {
    Scores scores, grad_scores;
    Operand probabilities;
    start_scores(scores);
    start_grad_scores(grad_scores);
    warpgroup_wait<1>();
    softmax(place, scores, probabilities);
    warpgroup_wait<0>();
    bool first = true;
    while (!last_) {
      take_step<false>(place, first, scores, probabilities, grad_scores, grad_key, grad_value);
      first = false;
    }
    take_step<true>(place, first, scores, probabilities, grad_scores, grad_key, grad_value);
    GradQuery grad_query;
    start_grad_query(false, grad_query);
    warpgroup_wait<0>();
    write_grad_query(grad_query);
    send_grad_query();
  }

  // Takes a step, whose P and dP have been computed, and computes those of the next, unless this is
  // the last. The dQ computed here is that of the step before, so that neither consumer waits for
  // what the other has just begun.
  template <bool kLast>
  __device__ void take_step(const Place& place, bool first, Scores& scores, Operand& probabilities,
                            Scores& grad_scores, GradKey& grad_key, GradKey& grad_value) {
    const int query_slot = queries_.slot, grad_slot = grads_.slot;
    warpgroup_fence_operand(grad_scores);
    accumulate(probabilities, shared_.grad_out[grad_slot], grad_value);
    Operand operand;  // dS^T
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      operand(i) = static_cast<Element>(scores(i) * grad_scores(i));
    }
    // The other consumer has read what the slot held, dS of three steps ago. For both consumers
    // send dQ of a step after they have computed it, and before this one wrote its last dQ (of two
    // steps ago or later) it waited until the writer had taken that of three steps ago from both.
    store_transposed(operand, shared_.grad_scores[queries_.slot]);
    GradQuery grad_query;
    start_grad_query(first, grad_query);
    accumulate(operand, shared_.query[query_slot], grad_key);
    fence_async_proxy_shared();  // wgmma reads what store_transposed's stores wrote
    shared_.grad_scores_full[query_slot].arrive();
    queries_.advance();
    grads_.advance();
    warpgroup_wait<1>();  // all but dK
    warpgroup_fence_operand(grad_value);
    shared_.grad_out_empty[grad_slot].arrive();
    if (!first) write_grad_query(grad_query);
    if constexpr (!kLast) start_scores(scores);
    if (!first) send_grad_query();
    warpgroup_wait<kLast ? 0 : 1>();
    warpgroup_fence_operand(grad_key);
    if constexpr (!kLast) {
      start_grad_scores(grad_scores);
      warpgroup_wait<1>();
      softmax(place, scores, probabilities);
      warpgroup_wait<0>();
    }
  }

  // Starts dQ = dS K of the earliest step that has none yet. In the first step of an item there is
  // no such step (`none`): what is computed then is not used, which costs less than a branch around
  // wgmma.
  __device__ void start_grad_query(bool none, GradQuery& grad_query) {
    if (!none) shared_.grad_scores_full[unsent_.slot].wait(unsent_.parity);
    multiply(typename Traits::GradQueryMma{}, shared_.grad_scores[unsent_.slot],
             typename Traits::ScoreLayout{}, shared_.key, typename Traits::KeyLayoutT{},
             grad_query);
  }

  // Stores dS^T as the first operand of dQ, the queries of a key side by side. A lane gives the
  // place of 8 queries; the swizzle flips the bits of the address that count such chunks.
  __device__ void store_transposed(const Operand& operand, Element* to) const {
    static_assert(kQueryTile == kPanel);
    const int lane = thread_ % 32;
    const uint32_t first = static_cast<uint32_t>(__cvta_generic_to_shared(
        to + typename Traits::ScoreOffsets{}(lane / 16 * 8, thread_ / 32 * 16 + lane % 16)));
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

  // Starts S^T = K Q^T - lse / scale of the current step.
  __device__ void start_scores(Scores& scores) {
    shared_.query_full[queries_.slot].wait(queries_.parity);
    masked_ = shared_.step[queries_.slot].masked | shared_.any_not_finite;
    last_ = shared_.step[queries_.slot].last;
    start_from(shared_.score_start[queries_.slot], scores);
    multiply<GMMA::ScaleOut::One>(typename Traits::ScoreMma{}, shared_.key,
                                  typename Traits::KeyLayout{}, shared_.query[queries_.slot],
                                  typename Traits::QueryLayout{}, scores);
  }

  // Starts dP^T = V dO^T - delta of the current step.
  __device__ void start_grad_scores(Scores& grad_scores) {
    shared_.grad_out_full[grads_.slot].wait(grads_.parity);
    start_from(shared_.grad_score_start[grads_.slot], grad_scores);
    multiply<GMMA::ScaleOut::One>(typename Traits::ScoreMma{}, shared_.value,
                                  typename Traits::KeyLayout{}, shared_.grad_out[grads_.slot],
                                  typename Traits::QueryLayout{}, grad_scores);
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

  // Turns scores into probabilities.
  __device__ void softmax(const Place& place, Scores& scores, Operand& probabilities) {
    warpgroup_fence_operand(scores);
    if (masked_) hide(place, shared_.step[queries_.slot], scores);
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = exp2_approx(scores(i) * score_scale_);
      probabilities(i) = static_cast<Element>(scores(i));
      all ^= __float_as_uint(scores(i));
    }
    compute_here(__uint_as_float(all));  // while dP is computed; below 2, as each of them is
  }

  // The query, within the tile, of score i of either of the thread's keys.
  __device__ static int column(int i) {
    return static_cast<int>(threadIdx.x) % 4 * 2 + accumulator_column(i);
  }

  // Starts result = A B of tiles in shared memory, or result += A B.
  template <GMMA::ScaleOut kScaleOut = GMMA::ScaleOut::Zero, typename Mma, typename ALayout,
            typename BLayout, typename Result>
  __device__ void multiply(Mma mma, Element* a, ALayout, Element* b, BLayout,
                           Result& result) const {
    int consumer = consumer_;
    // Else descriptors are computed ahead of the loop, and spilled.
    asm volatile("" : "+r"(consumer));
    auto thread_mma = mma.get_thread_slice(consumer * kWarpGroup);
    start_product<kScaleOut>(
        mma, thread_mma.partition_fragment_A(make_tensor(make_smem_ptr(a), ALayout{})),
        thread_mma.partition_fragment_B(make_tensor(make_smem_ptr(b), BLayout{})), result);
  }

  // Starts result += A B, with A in registers and B the queries' rows.
  __device__ void accumulate(Operand& a, Element* b, GradKey& result) const {
    typename Traits::GradKeyMma mma;
    auto thread_mma = mma.get_thread_slice(consumer_ * kWarpGroup);
    warpgroup_fence_operand(a);
    start_product<GMMA::ScaleOut::One>(mma, a,
                                       thread_mma.partition_fragment_B(make_tensor(
                                           make_smem_ptr(b), typename Traits::QueryLayoutT{})),
                                       result);
  }

  // Gives hidden scores a probability of 0, and makes visible ones NaN where the key or its value
  // is not finite.
  __device__ void hide(const Place& place, const Step& step, Scores& scores) const {
    const Visibility& visibility = params_.backward.visibility;
    const RowBounds& layout = visibility.row_bounds;
    const int first_query = step.first_query + column(0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = place.n_block * kBlockSize + key_row() + half * 8;
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
      if (layout.data == nullptr || key >= visibility.seqlen_k) continue;
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

  // Writes dQ of the earliest step not sent yet to where the writer takes it from.
  __device__ void write_grad_query(GradQuery& grad_query) {
    warpgroup_fence_operand(grad_query);
    if constexpr (Traits::kDeterministic) {
#pragma unroll
      for (int i = 0; i < size(grad_query); ++i) {
        const float scale = shared_.query_scale[unsent_.slot][tile_row() + i % 4 / 2 * 8] *
                            shared_.key_scale[consumer_ * (Traits::kHeadDim / kConsumers) +
                                              i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2];
        grad_query(i) = __int_as_float(__float2int_rn(grad_query(i) * scale));
      }
    }
    shared_.sums_empty.wait(sums_.parity ^ 1);
    auto* to = reinterpret_cast<float4*>(shared_.grad_query) + thread_;
#pragma unroll
    for (int i = 0; i < size(grad_query); i += 4) {
      to[i / 4 * kConsumerThreads] =
          make_float4(grad_query(i), grad_query(i + 1), grad_query(i + 2), grad_query(i + 3));
    }
  }

  // Hands it to the writer, and frees the slot of its queries.
  __device__ void send_grad_query() {
    fence_async_proxy_shared();  // a bulk copy reads what write_grad_query's stores wrote
    shared_.sums_full.arrive();
    sums_.advance();
    shared_.query_empty[unsent_.slot].arrive();
    unsent_.advance();
  }

  __device__ void store(const Place& place, const GradKey& grad, float scale, const Rows& rows,
                        int64_t head_dim, bool aligned) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t key = place.n_block * kBlockSize + key_row() + half * 8;
      Element* row = static_cast<Element*>(rows.data) + place.batch * rows.batch_stride +
                     place.key_head * rows.head_stride + key * rows.row_stride;
      store_row(grad, half, scale, row, key < params_.backward.visibility.seqlen_k,
                static_cast<int>(head_dim), aligned);
    }
  }

  // The thread's first key in the block, and its first row in the query tile; its second is 8
  // further on.
  __device__ int key_row() const { return thread_ / 32 * 16 + thread_ % 32 / 4; }
  __device__ int tile_row() const { return thread_ % kWarpGroup / 32 * 16 + thread_ % 32 / 4; }

  const KernelParams& params_;
  SharedStorage& shared_;
  const int consumer_;
  const int thread_;  // of both consumers
  const float score_scale_;
  const float hidden_;  // a score whose probability is 0
  RingPosition<Traits::kQuerySlots> queries_, unsent_;
  RingPosition<Traits::kGradOutSlots> grads_;
  RingPosition<1> sums_;
  bool masked_, last_;  // of the current step
};

}  // namespace rrattn::cuda::sm90::backward
