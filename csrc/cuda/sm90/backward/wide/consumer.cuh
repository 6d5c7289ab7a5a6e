// The two consumer warp groups of the gradients for head sizes above 128, both with the same keys,
// against the queries that the producer brings.
//
//   the first:   S^T = K Q^T - lse / scale,  P = exp(scale S),  dV += P^T dO
//   the second:  dP^T = V dO^T - delta,  dS = P dP,  dK += dS^T Q
//   both:        dQ = dS K, half of the columns each
//
// The first is a step ahead: it computes dQ of the step before, whose dS the second has then.
// Every thread arrives at the barriers, since racecheck understands no others.
#pragma once

#include "../consumer_parts.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward::wide {

// What both have.
template <typename Traits>
class Consumer : protected ConsumerParts<Traits> {
  using Parts = ConsumerParts<Traits>;

 public:
  using Parts::Parts;

 protected:
  using typename Parts::GradQuery;

  // Where dQ of a step goes, and in deterministic mode the scales of the thread's two rows.
  struct Sums {
    int tile;
    float query_scale[2];
  };

  // The sums of the step in a slot of queries.
  __device__ Sums sums_of(int query_slot) const {
    Sums sums{shared_.sums_tile[query_slot], {}};
    if constexpr (Traits::kDeterministic) {
      for (int half = 0; half < 2; ++half)
        sums.query_scale[half] = shared_.query_scale[query_slot][this->tile_row() + half * 8];
    }
    return sums;
  }

  // Starts dQ = dS K, of the dS in a slot.
  __device__ void start_grad_query(int slot, GradQuery& grad_query) const {
    this->multiply(typename Traits::GradQueryMma{}, consumer_, shared_.grad_scores[slot],
                   typename Traits::ScoreLayout{}, shared_.key, typename Traits::KeyLayoutT{},
                   grad_query);
  }

  // Adds dQ to the sums in the workspace.
  __device__ void add_to_sums(const Sums& sums, GradQuery& grad_query) const {
    constexpr int kTileElements = kQueryTile * Traits::kHeadDim;
    uint32_t* to = params_.workspace.grad_query + static_cast<int64_t>(sums.tile) * kTileElements +
                   thread_ * 4;
    warpgroup_fence_operand(grad_query);
#pragma unroll
    for (int i = 0; i < size(grad_query); i += 4) {
      uint32_t* four = to + i * kConsumerThreads;
      if constexpr (Traits::kDeterministic) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float key_scale = shared_.key_scale[consumer_ * (Traits::kHeadDim / kConsumers) +
                                                    i / 4 * 8 + threadIdx.x % 4 * 2 + j % 2];
          const float scaled = grad_query(i + j) * (sums.query_scale[j / 2] * key_scale);
          atomicAdd(reinterpret_cast<int*>(four + j), __float2int_rn(scaled));
        }
      } else {
        atomicAdd(
            reinterpret_cast<float4*>(four),
            make_float4(grad_query(i), grad_query(i + 1), grad_query(i + 2), grad_query(i + 3)));
      }
    }
  }

  // P of a step lies in the order of the accumulators, four at a time side by side.
  __device__ float4* probabilities() const {
    return reinterpret_cast<float4*>(shared_.probabilities) + thread_ % kWarpGroup;
  }

  using Parts::consumer_, Parts::params_, Parts::shared_, Parts::thread_;
  RingPosition<Traits::kQuerySlots> queries_;
  RingPosition<Traits::kGradOutSlots> grads_;
  RingPosition<Traits::kGradScoreSlots> grad_scores_;
  RingPosition<1> probabilities_;
};

// The first.
template <typename Traits>
class ValueConsumer : Consumer<Traits> {
  using Base = Consumer<Traits>;
  using Parts = ConsumerParts<Traits>;
  using typename Parts::GradQuery, typename Parts::Operand, typename Parts::Scores,
      typename Base::Sums;
  using GradValue = decltype(partition_fragment_C(
      typename Traits::GradValueMma{}, Shape<Int<Traits::kKeys>, Int<Traits::kHeadDimV>>{}));

 public:
  using Base::Base;

  __device__ void consume_items() {
    this->template consume<GradValue, GradKeyTarget::value>(
        [&](GradValue(&grads)[1]) { take_steps(grads[0]); });
  }

 private:
  __device__ void take_steps(GradValue& grad_value) {
    GradQuery grad_query;
    Sums unsent{};  // of the step before
    bool first = true, last = false;
    do {
      Scores scores;
      Operand probabilities;
      shared_.query_full[queries_.slot].wait(queries_.parity);
      const QueryStep step = shared_.step[queries_.slot];
      const Sums sums = this->sums_of(queries_.slot);
      last = step.last;
      this->start_from(shared_.score_start[queries_.slot], scores);
      this->template multiply<GMMA::ScaleOut::One>(
          typename Traits::ScoreMma{}, 0, shared_.key, typename Traits::KeyLayout{},
          shared_.query[queries_.slot], typename Traits::QueryLayout{}, scores);
      warpgroup_wait<0>();
      this->softmax(step, step.masked | shared_.any_not_finite, scores, probabilities);
      shared_.query_empty[queries_.slot].arrive();
      queries_.advance();
      hand_over(scores);
      shared_.grad_out_full[grads_.slot].wait(grads_.parity);
      this->accumulate(typename Traits::GradValueMma{}, 0, probabilities,
                       shared_.grad_out[grads_.slot], typename Traits::GradOutLayoutT{},
                       grad_value);
      // In the first step of an item there is no dS yet. What is computed then is not used, which
      // costs less than a branch around wgmma.
      if (!first) shared_.grad_scores_full[grad_scores_.slot].wait(grad_scores_.parity);
      this->start_grad_query(grad_scores_.slot, grad_query);
      warpgroup_wait<1>();
      warpgroup_fence_operand(grad_value);
      shared_.grad_out_empty[grads_.slot].arrive();
      grads_.advance();
      warpgroup_wait<0>();
      if (!first) send(unsent, grad_query);
      unsent = sums;
      first = false;
    } while (!last);
    shared_.grad_scores_full[grad_scores_.slot].wait(grad_scores_.parity);
    this->start_grad_query(grad_scores_.slot, grad_query);
    warpgroup_wait<0>();
    send(unsent, grad_query);
  }

  // Gives P to the second consumer, once that has read P of the step before.
  __device__ void hand_over(const Scores& scores) {
    shared_.probabilities_empty.wait(probabilities_.parity ^ 1);
    probabilities_.advance();
#pragma unroll
    for (int i = 0; i < size(scores); i += 4) {
      this->probabilities()[i / 4 * kWarpGroup] =
          make_float4(scores(i), scores(i + 1), scores(i + 2), scores(i + 3));
    }
    shared_.probabilities_full.arrive();
  }

  // Adds dQ to the sums, and frees its dS.
  __device__ void send(const Sums& sums, GradQuery& grad_query) {
    shared_.grad_scores_empty[grad_scores_.slot].arrive();
    grad_scores_.advance();
    this->add_to_sums(sums, grad_query);
  }

  using Base::grad_scores_, Base::grads_, Base::probabilities_, Base::queries_;
  using Parts::params_, Parts::shared_;
};

// The second.
template <typename Traits>
class KeyConsumer : Consumer<Traits> {
  using Base = Consumer<Traits>;
  using Parts = ConsumerParts<Traits>;
  using typename Parts::Element, typename Parts::GradQuery, typename Parts::Operand,
      typename Parts::Scores, typename Base::Sums;
  using GradKey = decltype(partition_fragment_C(
      typename Traits::GradKeyMma{}, Shape<Int<Traits::kKeys>, Int<Traits::kHeadDim>>{}));

 public:
  using Base::Base;

  __device__ void consume_items() {
    this->template consume<GradKey, GradKeyTarget::key>(
        [&](GradKey(&grads)[1]) { take_steps(grads[0]); });
  }

 private:
  __device__ void take_steps(GradKey& grad_key) {
    bool last = false;
    do {
      Scores grad_scores;
      shared_.grad_out_full[grads_.slot].wait(grads_.parity);
      this->start_from(shared_.grad_score_start[grads_.slot], grad_scores);
      this->template multiply<GMMA::ScaleOut::One>(
          typename Traits::ScoreMma{}, 0, shared_.value, typename Traits::ValueLayout{},
          shared_.grad_out[grads_.slot], typename Traits::GradOutLayout{}, grad_scores);
      warpgroup_wait<0>();
      warpgroup_fence_operand(grad_scores);
      shared_.grad_out_empty[grads_.slot].arrive();
      grads_.advance();
      Operand operand;  // dS^T
      take_over(grad_scores, operand);
      // The first consumer has read what the slot held, dS of two steps ago, and this one as well:
      // all of it has since been at the barrier of the step between.
      shared_.grad_scores_empty[grad_scores_.slot].wait(grad_scores_.parity ^ 1);
      this->store_transposed(operand, shared_.grad_scores[grad_scores_.slot]);
      fence_async_proxy_shared();  // wgmma reads what these stores wrote
      shared_.grad_scores_full[grad_scores_.slot].arrive();
      shared_.query_full[queries_.slot].wait(queries_.parity);
      last = shared_.step[queries_.slot].last;
      const Sums sums = this->sums_of(queries_.slot);
      this->accumulate(typename Traits::GradKeyMma{}, 0, operand, shared_.query[queries_.slot],
                       typename Traits::QueryLayoutT{}, grad_key);
      shared_.grad_scores_full[grad_scores_.slot].wait(grad_scores_.parity);
      GradQuery grad_query;
      this->start_grad_query(grad_scores_.slot, grad_query);
      grad_scores_.advance();
      warpgroup_wait<1>();
      warpgroup_fence_operand(grad_key);
      shared_.query_empty[queries_.slot].arrive();
      queries_.advance();
      warpgroup_wait<0>();
      this->add_to_sums(sums, grad_query);
    } while (!last);
  }

  // dS^T = P^T dP^T, with P from the first consumer.
  __device__ void take_over(const Scores& grad_scores, Operand& operand) {
    shared_.probabilities_full.wait(probabilities_.parity);
    probabilities_.advance();
#pragma unroll
    for (int i = 0; i < size(grad_scores); i += 4) {
      const float4 four = this->probabilities()[i / 4 * kWarpGroup];
      operand(i) = static_cast<Element>(four.x * grad_scores(i));
      operand(i + 1) = static_cast<Element>(four.y * grad_scores(i + 1));
      operand(i + 2) = static_cast<Element>(four.z * grad_scores(i + 2));
      operand(i + 3) = static_cast<Element>(four.w * grad_scores(i + 3));
    }
    shared_.probabilities_empty.arrive();
  }

  using Base::grad_scores_, Base::grads_, Base::probabilities_, Base::queries_;
  using Parts::params_, Parts::shared_;
};

}  // namespace rrattn::cuda::sm90::backward::wide
