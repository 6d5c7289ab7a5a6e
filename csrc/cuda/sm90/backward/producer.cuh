// The producer warp of the gradients: it takes items, walks the query blocks that selected their
// keys, and copies both.
#pragma once

#include "../common/tensor_copy.cuh"
#include "config.cuh"
#include "part_blocks.cuh"

namespace rrattn::cuda::sm90::backward {

// The barriers between the producer and the consumers.
template <typename Traits>
__device__ inline void init_steps(typename Traits::SharedStorage& shared) {
  shared.any_not_finite = false;
  shared.item_full.init(1);
  shared.item_empty.init(kConsumerThreads);
  for (int slot = 0; slot < Traits::kQuerySlots; ++slot) {
    shared.query_full[slot].init(1);
    shared.query_empty[slot].init(kConsumerThreads);
  }
  for (int slot = 0; slot < Traits::kGradOutSlots; ++slot) {
    shared.grad_out_full[slot].init(1);
    shared.grad_out_empty[slot].init(kConsumerThreads);
  }
}

template <typename Traits>
__device__ void produce_steps(const KernelParams& params, typename Traits::SharedStorage& shared) {
  const Visibility& visibility = params.backward.visibility;
  const Workspace& workspace = params.workspace;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const bool leader = threadIdx.x == 0;
  RingPosition<1> items;
  RingPosition<Traits::kQuerySlots> queries;
  RingPosition<Traits::kGradOutSlots> grads;
  RingPosition<Traits::kSumsSlots> sums;

  for (;;) {
    const int item = take_item(workspace.next_item);
    if (item >= params.order.num_items) break;
    const Place<Traits::kKeys> place(params.backward, params.order, item);
    if (place.window(params.order) < place.first_window(visibility, params.order)) continue;
    shared.item_empty.wait(items.parity ^ 1);  // until the consumers are done with the last item
    items.advance();

    PartBlocks<Traits::kKeys> blocks(params, place);
    bool more = blocks.next();
    if (leader) {
      shared.item = {place, false, !more};
      if (more) {
        constexpr uint32_t kScaleBytes = Traits::kHeadDim * sizeof(float);
        shared.item_full.arrive_and_expect(sizeof(shared.key) + sizeof(shared.value) +
                                           (Traits::kDeterministic ? kScaleBytes : 0));
        if constexpr (Traits::kDeterministic) {
          SM90_BULK_COPY_G2S::copy(
              workspace.key_scale +
                  (place.batch * params.backward.heads.num_heads_k + place.key_head) *
                      Traits::kHeadDim,
              shared.item_full.raw(), shared.key_scale, kScaleBytes);
        }
        copy_rows<Traits::kPanels>(shared.key, params.key, Traits::kKeys, place.first_key(),
                                   place.key_head, place.batch, shared.item_full);
        copy_rows<Traits::kValuePanels>(shared.value, params.value, Traits::kKeys,
                                        place.first_key(), place.key_head, place.batch,
                                        shared.item_full);
      } else {
        shared.item_full.arrive();
      }
    }
    while (more) {
      const int m_block = blocks.m_block(), head = blocks.head();
      const bool masked = blocks.masked();
      more = blocks.next();
      for (int t = kQueryTiles - 1; t >= 0; --t) {
        const int first_query = m_block * kBlockSize + t * kQueryTile;
        const int tile = static_cast<int>(
            ((place.batch * visibility.num_heads + head) * num_m_blocks + m_block) * kQueryTiles +
            t);
        const int64_t statistics = static_cast<int64_t>(tile) * kQueryTile;
        shared.query_empty[queries.slot].wait(queries.parity ^ 1);
        if (leader) {
          shared.step[queries.slot] = {first_query, head, masked, !more && t == 0};
          shared.sums_tile[sums.slot] = tile;
          Barrier& full = shared.query_full[queries.slot];
          full.arrive_and_expect(sizeof(shared.query[0]) +
                                 kStatisticsBytes * (Traits::kDeterministic ? 2 : 1));
          copy_rows<Traits::kPanels>(shared.query[queries.slot], params.query, kQueryTile,
                                     first_query, head, place.batch, full);
          SM90_BULK_COPY_G2S::copy(workspace.score_start + statistics, full.raw(),
                                   shared.score_start[queries.slot], kStatisticsBytes);
          if constexpr (Traits::kDeterministic) {
            SM90_BULK_COPY_G2S::copy(workspace.query_scale + statistics, full.raw(),
                                     shared.query_scale[queries.slot], kStatisticsBytes);
          }
        }
        queries.advance();
        sums.advance();
        shared.grad_out_empty[grads.slot].wait(grads.parity ^ 1);
        if (leader) {
          Barrier& full = shared.grad_out_full[grads.slot];
          full.arrive_and_expect(sizeof(shared.grad_out[0]) + kStatisticsBytes);
          copy_rows<Traits::kValuePanels>(shared.grad_out[grads.slot], params.grad_out, kQueryTile,
                                          first_query, head, place.batch, full);
          SM90_BULK_COPY_G2S::copy(workspace.grad_score_start + statistics, full.raw(),
                                   shared.grad_score_start[grads.slot], kStatisticsBytes);
        }
        grads.advance();
      }
    }
  }
  shared.item_empty.wait(items.parity ^ 1);
  if (leader) {
    shared.item.none_left = true;
    shared.sums_tile[sums.slot] = -1;
    shared.item_full.arrive();
  }
}

}  // namespace rrattn::cuda::sm90::backward
