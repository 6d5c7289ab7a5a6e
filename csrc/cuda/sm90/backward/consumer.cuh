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

#include "consumer_parts.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
class Consumer : ConsumerParts<Traits> {
  using Parts = ConsumerParts<Traits>;
  using typename Parts::Element, typename Parts::GradQuery, typename Parts::Operand,
      typename Parts::Scores, typename Parts::SharedStorage;
  using GradKey = decltype(partition_fragment_C(typename Traits::GradKeyMma{},
                                                Shape<Int<kBlockSize>, Int<Traits::kHeadDim>>{}));

 public:
  using Parts::Parts;

  __device__ void consume_items() {
    this->template consume<GradKey, GradKeyTarget::key, GradKeyTarget::value>(
        [&](GradKey(&grads)[2]) { take_steps(grads[0], grads[1]); });
  }

 private:
  __device__ void take_steps(GradKey& grad_key, GradKey& grad_value) {
    Scores scores, grad_scores;
    Operand probabilities;
    start_scores(scores);
    start_grad_scores(grad_scores);
    warpgroup_wait<1>();
    softmax(shared_.step[queries_.slot], masked_, scores, probabilities);
    warpgroup_wait<0>();
    bool first = true;
    while (!last_) {
      take_step<false>(first, scores, probabilities, grad_scores, grad_key, grad_value);
      first = false;
    }
    take_step<true>(first, scores, probabilities, grad_scores, grad_key, grad_value);
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
  __device__ void take_step(bool first, Scores& scores, Operand& probabilities, Scores& grad_scores,
                            GradKey& grad_key, GradKey& grad_value) {
    const int query_slot = queries_.slot, grad_slot = grads_.slot;
    warpgroup_fence_operand(grad_scores);
    accumulate_key(probabilities, shared_.grad_out[grad_slot], grad_value);
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
    accumulate_key(operand, shared_.query[query_slot], grad_key);
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
      softmax(shared_.step[queries_.slot], masked_, scores, probabilities);
      warpgroup_wait<0>();
    }
  }

  // Starts dQ = dS K of the earliest step that has none yet. In the first step of an item there is
  // no such step (`none`): what is computed then is not used, which costs less than a branch around
  // wgmma.
  __device__ void start_grad_query(bool none, GradQuery& grad_query) {
    if (!none) shared_.grad_scores_full[unsent_.slot].wait(unsent_.parity);
    multiply(typename Traits::GradQueryMma{}, consumer_, shared_.grad_scores[unsent_.slot],
             typename Traits::ScoreLayout{}, shared_.key, typename Traits::KeyLayoutT{},
             grad_query);
  }

  // Starts dV += P^T dO or dK += dS^T Q.
  __device__ void accumulate_key(Operand& a, Element* b, GradKey& result) const {
    accumulate(typename Traits::GradKeyMma{}, consumer_, a, b, typename Traits::QueryLayoutT{},
               result);
  }

  // Starts S^T = K Q^T - lse / scale of the current step.
  __device__ void start_scores(Scores& scores) {
    shared_.query_full[queries_.slot].wait(queries_.parity);
    masked_ = shared_.step[queries_.slot].masked | shared_.any_not_finite;
    last_ = shared_.step[queries_.slot].last;
    start_from(shared_.score_start[queries_.slot], scores);
    this->template multiply<GMMA::ScaleOut::One, Traits::kUsedColumns / 16>(
        typename Traits::ScoreMma{}, consumer_, shared_.key, typename Traits::KeyLayout{},
        shared_.query[queries_.slot], typename Traits::QueryLayout{}, scores);
  }

  // Starts dP^T = V dO^T - delta of the current step.
  __device__ void start_grad_scores(Scores& grad_scores) {
    shared_.grad_out_full[grads_.slot].wait(grads_.parity);
    start_from(shared_.grad_score_start[grads_.slot], grad_scores);
    this->template multiply<GMMA::ScaleOut::One, Traits::kUsedColumns / 16>(
        typename Traits::ScoreMma{}, consumer_, shared_.value, typename Traits::KeyLayout{},
        shared_.grad_out[grads_.slot], typename Traits::QueryLayout{}, grad_scores);
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
    shared_.sums_empty.wait(sums_.parity);
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

  using Parts::accumulate, Parts::multiply, Parts::softmax, Parts::start_from,
      Parts::store_transposed, Parts::tile_row;
  using Parts::consumer_, Parts::params_, Parts::shared_, Parts::thread_;

  RingPosition<Traits::kQuerySlots> queries_, unsent_;
  RingPosition<Traits::kGradOutSlots> grads_;
  RingPosition<1> sums_;
  bool masked_, last_;  // of the current step
};

}  // namespace rrattn::cuda::sm90::backward
