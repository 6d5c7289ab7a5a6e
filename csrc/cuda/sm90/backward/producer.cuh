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
  shared.item_empty.init(kConsumerThreads + kConsumers * 32);  // consumers and keepers
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    shared.turn_full[consumer].init(32);
    shared.turn_empty[consumer].init(kWarpGroup);
  }
  for (int slot = 0; slot < Traits::kQuerySlots; ++slot) {
    shared.query_full[slot].init(1);
    shared.query_empty[slot].init(kConsumerThreads);
  }
  for (int slot = 0; slot < Traits::kGradOutSlots; ++slot) {
    shared.grad_out_full[slot].init(1);
    shared.grad_out_empty[slot].init(kConsumerThreads);
  }
}

// Gives the consumers and keepers an item, with its keys and values if it has any steps.
template <typename Traits>
__device__ inline void give_item(const KernelParams& params, typename Traits::SharedStorage& shared,
                                 const Item<Traits::kKeys>& item) {
  shared.item = item;
  if (item.nothing_selected) {
    shared.item_full.arrive();
    return;
  }
  const auto& place = item.place;
  constexpr uint32_t kScaleBytes = Traits::kHeadDim * sizeof(float);
  shared.item_full.arrive_and_expect(sizeof(shared.key) + sizeof(shared.value) +
                                     (Traits::kDeterministic ? kScaleBytes : 0));
  if constexpr (Traits::kDeterministic) {
    SM90_BULK_COPY_G2S::copy(
        params.workspace.key_scale +
            (place.batch * params.backward.heads.num_heads_k + place.key_head) * Traits::kHeadDim,
        shared.item_full.raw(), shared.key_scale, kScaleBytes);
  }
  copy_rows<Traits::kPanels>(shared.key, params.key, Traits::kKeys, place.first_key(),
                             place.key_head, place.batch, shared.item_full);
  copy_rows<Traits::kValuePanels>(shared.value, params.value, Traits::kKeys, place.first_key(),
                                  place.key_head, place.batch, shared.item_full);
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
  const bool merged = params.items != nullptr;
  const int num_items = merged ? *params.num_items : params.order.num_items;

  for (;;) {
    const int item = take_item(workspace.next_item);
    if (item >= num_items) break;
    const MergedItem taken = merged ? params.items[item] : MergedItem{item, 0};
    const int parts_before = taken.parts_before;
    const Place<Traits::kKeys> place(params.backward, params.order, taken.number);
    PartBlocks<Traits::kKeys> blocks(params, place, parts_before);
    bool more = blocks.next();
    shared.item_empty.wait(items.parity ^ 1);  // until all are done with the last item
    items.advance();
    if (leader) give_item<Traits>(params, shared, {place, parts_before, false, !more});
    while (more) {
      const int m_block = blocks.m_block(), head = blocks.head();
      const bool masked = blocks.masked(), bounded = blocks.bounded();
      more = blocks.next();
      for (int t = kQueryTiles - 1; t >= 0; --t) {
        const int first_query = m_block * kBlockSize + t * kQueryTile;
        const int tile = static_cast<int>(
            ((place.batch * visibility.num_heads + head) * num_m_blocks + m_block) * kQueryTiles +
            t);
        const int64_t statistics = static_cast<int64_t>(tile) * kQueryTile;
        shared.query_empty[queries.slot].wait(queries.parity ^ 1);
        if (leader) {
          shared.step[queries.slot] = {first_query, head, masked, bounded, !more && t == 0};
          shared.sums_tile[queries.slot] = tile;
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
  shared.query_empty[queries.slot].wait(queries.parity ^ 1);
  if (leader) {
    shared.item.none_left = true;
    shared.sums_tile[queries.slot] = -1;
    shared.query_full[queries.slot].arrive();
    shared.item_full.arrive();
  }
}

}  // namespace rrattn::cuda::sm90::backward
