// The keepers: a warp for each consumer, which waits for the consumer's turns at the sums of dK and
// dV while that computes them, and gives the next item its turn while that goes on.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
__device__ void keep_turns(const KernelParams& params, typename Traits::SharedStorage& shared,
                           int consumer) {
  const bool leader = threadIdx.x % 32 == 0;
  for (RingPosition<1> items;; items.advance()) {
    shared.item_full.wait(items.parity);
    const Item<Traits::kKeys> item = shared.item;
    if (item.none_left) return;
    shared.item_empty.arrive();
    // Consumers have tickets of their own, since none adds to sums of another.
    const cuda::backward::KeyTurn<Traits::kKeys> turn(
        params.backward, params.order, params.key_sums.tickets, item.place, item.parts_before,
        !item.nothing_selected, kConsumers, consumer);
    if (leader)
      shared.turn[consumer] = {item.place, turn.slot(), turn.last(), turn.any_sums(),
                               turn.something()};
    shared.turn_full[consumer].arrive();
    shared.turn_empty[consumer].wait(items.parity);  // until it has added its gradients
    if (leader && params.order.num_parts > 1) turn.end();
  }
}

}  // namespace rrattn::cuda::sm90::backward
