// A consumer warp group of the gradients for head sizes up to 64: 64 keys, against the queries that
// the producer brings, a tile at a step.
//
//   S^T = K Q^T - lse / scale,  P = exp(scale S),  dP^T = V dO^T - delta,  dS = P dP
//   dV += P^T dO,  dK += dS^T Q,  dQ = dS K
//
// With half of the columns a product takes half of the time, but P and dS as long as ever. So the
// products of a step are started in an order that leaves the tensor cores work meanwhile: while dS is
// computed dV and S of the next step, while the next P is computed dK, dQ and dP of the next step. dQ,
// for which each consumer waits for the other, is that of the block before.
//
// Every thread arrives at the barriers, since racecheck understands no others.
#pragma once

#include "../consumer_parts.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward::narrow {

template <typename Traits>
class Consumer : ConsumerParts<Traits> {
  using Parts = ConsumerParts<Traits>;
  using typename Parts::Element, typename Parts::GradQuery, typename Parts::Operand,
      typename Parts::Scores;
  using GradKey = decltype(partition_fragment_C(
      typename Traits::GradKeyMma{}, Shape<Int<Traits::kKeys>, Int<Traits::kHeadDim>>{}));
  using QueryBlock = RingPosition<Traits::kQueryBlocks>;
  using GradBlock = RingPosition<Traits::kGradOutBlocks>;  // of dO and dS
  static_assert(Traits::kGradOutBlocks == Traits::kGradScoreBlocks && kQueryTiles == 2);

 public:
  using Parts::Parts;

  __device__ void consume_items() {
    this->template consume<GradKey, GradKeyTarget::key, GradKeyTarget::value>(
        [&](GradKey(&grads)[2]) { take_blocks(grads[0], grads[1]); });
  }

 private:
  __device__ void take_blocks(GradKey& grad_key, GradKey& grad_value) {
    Scores scores[kQueryTiles], grad_scores;
    Operand probabilities;
    GradQuery grad_query;
    start_scores<0>(queries_, scores[0]);
    start_grad_scores<0>(grads_, grad_scores);
    warpgroup_wait<1>();
    softmax(shared_.step[slot<0>(queries_)], masked_, scores[0], probabilities);
    warpgroup_wait<0>();
    bool first = true;
    for (;; first = false) {
      take_step<0, false>(first, scores[0], scores[1], probabilities, grad_scores, grad_key,
                          grad_value, grad_query);
      if (last_) break;
      take_step<1, false>(first, scores[1], scores[0], probabilities, grad_scores, grad_key,
                          grad_value, grad_query);
    }
    take_step<1, true>(first, scores[1], scores[0], probabilities, grad_scores, grad_key,
                       grad_value, grad_query);
    shared_.grad_scores_full[unsent_grads_.slot].wait(unsent_grads_.parity);
    start_grad_query(grad_query);
    warpgroup_wait<0>();
    send_grad_query(grad_query);
  }

  // Takes a step, the block's first or second, whose P and dP have been computed, and computes those
  // of the next, unless this is the last. dQ of the block before is computed in the first step and
  // sent in the second.
  template <int kTile, bool kLast>
  __device__ void take_step(bool first_block, Scores& scores, Scores& next_scores,
                            Operand& probabilities, Scores& grad_scores, GradKey& grad_key,
                            GradKey& grad_value, GradQuery& grad_query) {
    constexpr int kNextTile = 1 - kTile;
    const int query_slot = slot<kTile>(queries_), grad_slot = slot<kTile>(grads_);
    Element* tile = shared_.grad_scores[grads_.slot][kNextTile];  // the second has earlier queries
    QueryBlock next_queries = queries_;
    GradBlock next_grads = grads_;
    if constexpr (kTile == 1) next_queries.advance(), next_grads.advance();

    warpgroup_fence_operand(grad_scores);
    accumulate_key(probabilities, shared_.grad_out[grad_slot], grad_value);
    if constexpr (!kLast) start_scores<kNextTile>(next_queries, next_scores);
    if constexpr (kTile == 1) {
      if (!first_block) send_grad_query(grad_query);
    }
    Operand operand;  // dS^T
#pragma unroll
    for (int i = 0; i < size(scores); ++i) {
      operand(i) = static_cast<Element>(scores(i) * grad_scores(i));
    }
    if constexpr (kTile == 0) {
      // Both consumers are done with the block before then, whose dS is what dQ takes now, and so
      // with dQ of the block before that, whose dS the slot held.
      if (!first_block) shared_.grad_scores_full[unsent_grads_.slot].wait(unsent_grads_.parity);
    }
    store_transposed(operand, tile);
    fence_async_proxy_shared();  // wgmma reads what store_transposed's stores wrote
    if constexpr (kTile == 1) shared_.grad_scores_full[grads_.slot].arrive();
    accumulate_key(operand, shared_.query[query_slot], grad_key);
    // In the first block of an item there is no block before. What is computed then is not used,
    // which costs less than a branch around wgmma.
    if constexpr (kTile == 0) start_grad_query(grad_query);
    if constexpr (!kLast) start_grad_scores<kNextTile>(next_grads, grad_scores);
    warpgroup_wait<(kTile == 0) + (kLast ? 1 : 2)>();  // for dV and S of the next
    warpgroup_fence_operand(grad_value);
    shared_.grad_out_empty[grad_slot].arrive();
    if constexpr (!kLast) {
      softmax(shared_.step[slot<kNextTile>(next_queries)], masked_, next_scores, probabilities);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(grad_key);
    if constexpr (kTile == 1) {
      queries_ = next_queries;
      grads_ = next_grads;
    }
  }

  // The slot of a tile of the block.
  template <int kTile, int kBlocks>
  __device__ static int slot(const RingPosition<kBlocks>& block) {
    return block.slot * kQueryTiles + kTile;
  }

  // Starts dQ = dS K of the consumer's tile of the block not sent yet.
  __device__ void start_grad_query(GradQuery& grad_query) const {
    multiply(typename Traits::GradQueryMma{}, 0, shared_.grad_scores[unsent_grads_.slot][consumer_],
             typename Traits::ScoreLayout{}, shared_.key, typename Traits::KeyLayoutT{},
             grad_query);
  }

  // Starts dV += P^T dO or dK += dS^T Q.
  __device__ void accumulate_key(Operand& a, Element* b, GradKey& result) const {
    accumulate(typename Traits::GradKeyMma{}, consumer_, a, b, typename Traits::QueryLayoutT{},
               result);
  }

  // Starts S^T = K Q^T - lse / scale of a tile.
  template <int kTile>
  __device__ void start_scores(const QueryBlock& block, Scores& scores) {
    const int at = slot<kTile>(block);
    shared_.query_full[at].wait(block.parity);
    masked_ = shared_.step[at].masked | shared_.any_not_finite;
    last_ = shared_.step[at].last;
    start_from(shared_.score_start[at], scores);
    this->template multiply<GMMA::ScaleOut::One>(
        typename Traits::ScoreMma{}, consumer_, shared_.key, typename Traits::KeyLayout{},
        shared_.query[at], typename Traits::QueryLayout{}, scores);
  }

  // Starts dP^T = V dO^T - delta of a tile.
  template <int kTile>
  __device__ void start_grad_scores(const GradBlock& block, Scores& grad_scores) {
    const int at = slot<kTile>(block);
    shared_.grad_out_full[at].wait(block.parity);
    start_from(shared_.grad_score_start[at], grad_scores);
    this->template multiply<GMMA::ScaleOut::One>(
        typename Traits::ScoreMma{}, consumer_, shared_.value, typename Traits::KeyLayout{},
        shared_.grad_out[at], typename Traits::QueryLayout{}, grad_scores);
  }

  // Hands dQ of the consumer's tile of this block to the writer, and frees the slots of the block's
  // queries.
  __device__ void send_grad_query(GradQuery& grad_query) {
    warpgroup_fence_operand(grad_query);
    if constexpr (Traits::kDeterministic) {
      // The tile with the earlier queries, the first consumer's, was the block's second.
      const float* query_scale =
          shared_.query_scale[unsent_.slot * kQueryTiles + kQueryTiles - 1 - consumer_];
#pragma unroll
      for (int i = 0; i < size(grad_query); ++i) {
        const float scale = query_scale[tile_row() + i % 4 / 2 * 8] *
                            shared_.key_scale[i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2];
        grad_query(i) = __int_as_float(__float2int_rn(grad_query(i) * scale));
      }
    }
    shared_.sums_empty.wait(sums_.parity);
    auto* to = reinterpret_cast<float4*>(shared_.grad_query[consumer_]) + thread_ % kWarpGroup;
#pragma unroll
    for (int i = 0; i < size(grad_query); i += 4) {
      to[i / 4 * kWarpGroup] =
          make_float4(grad_query(i), grad_query(i + 1), grad_query(i + 2), grad_query(i + 3));
    }
    fence_async_proxy_shared();  // a bulk copy reads what these stores wrote
    shared_.sums_full.arrive();
    sums_.advance();
    shared_.query_empty[slot<0>(unsent_)].arrive();
    shared_.query_empty[slot<1>(unsent_)].arrive();
    unsent_.advance();
    unsent_grads_.advance();
  }

  using Parts::accumulate, Parts::multiply, Parts::softmax, Parts::start_from,
      Parts::store_transposed, Parts::tile_row;
  using Parts::consumer_, Parts::params_, Parts::shared_, Parts::thread_;

  QueryBlock queries_, unsent_;
  GradBlock grads_, unsent_grads_;
  RingPosition<1> sums_;
  bool masked_, last_;  // of the step whose S was started last
};

}  // namespace rrattn::cuda::sm90::backward::narrow
