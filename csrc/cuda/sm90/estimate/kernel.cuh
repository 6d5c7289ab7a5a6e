// Block scores on Hopper.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D]  ->  block_scores [B, Hq, Mq, Mk] float32
//
// pool_keys_kernel averages the keys of each stride and writes them in the order in which the
// tensor cores want them in shared memory, so that a tile of 128 strides is one contiguous bulk
// copy.
//
// estimate_kernel is persistent. An item is up to kConsumers row tiles of 64 sampled queries that
// share a key head, one for each consumer. One more warp group serves them: its first thread hands
// out the items and streams the tiles of pooled keys past all consumers, and its other three warps
// finish the last item. The consumers gather their queries themselves.
//
// A consumer computes S = Q K^T of a tile (wgmma), takes 2^(S - reference) and sums it over the
// strides of each key block. The reference of a row is its maximum over the first tile in which it
// sees anything: later tiles need no maximum and no rescaling, because a float's exponent has room
// for scores 2^100 times the reference. Items with a row that outgrows even that go on a list, and
// a second launch of the same kernel does these with the exact maximum, found by a pass of its own.
//
// The softmax's denominator is known only after the last tile, and it differs from row to row, so
// the sums wait in the workspace until it is. That is 4 bytes for every 16 scores (stride 8),
// written and read once, where the alternative is to compute every score twice.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "finisher.cuh"

namespace rrattn::cuda::sm90::estimate {

template <typename Traits>
__device__ inline void init_shared(typename Traits::SharedStorage& shared) {
  for (int slot = 0; slot < Traits::kKeySlots; ++slot) {
    shared.key_full[slot].init(1);  // the producer, with the bytes of the copy
    shared.key_empty[slot].init(Traits::kConsumers * 4);  // a lane of every consumer warp
  }
  for (int slot = 0; slot < kItemSlots; ++slot) {
    shared.item_full[slot].init(1);  // the producer
    shared.sums_full[slot].init(Traits::kConsumers * kWarpGroup);
    shared.item_empty[slot].init(kFinisherThreads);
  }
  for (auto& ring : shared.chunk_full) {
    for (Barrier& full : ring) full.init(1);
  }
  shared.sums_position = 0;
  cutlass::arch::fence_barrier_init();
}

// Calls: UsualCall, or RaggedRequests for the items of a ragged batch, the longest of all first.
template <typename Traits, int kKeyStride, typename Calls>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    estimate_kernel(const __grid_constant__ EstimateParams params,
                    const __grid_constant__ WorkLayout layout,
                    const __grid_constant__ Workspace<Traits> workspace, bool outgrown,
                    bool aligned, const __grid_constant__ Calls calls) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int num_items = outgrown ? *workspace.num_outgrown : calls.num_items(params, layout);
  const int passes = outgrown ? 2 : 1;  // of two the first is for the maximum
  if (static_cast<int>(blockIdx.x) >= num_items) return;
  const int warp_group = warp_group_index();
  if (threadIdx.x == 0) init_shared<Traits>(shared);
  __syncthreads();

  // All roles walk the same items, passes and tiles.
  RingPosition<kItemSlots> items;

  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kServiceRegisters>();
    if (threadIdx.x == 0) {
      RingPosition<Traits::kKeySlots> keys;
      const bool spread = params.sampling.spread > 0;
      // The slot is free once all consumers have read it.
      const auto next_slot = [&](int tile) {
        shared.key_empty[keys.slot].wait(keys.parity ^ 1);
        shared.tile[keys.slot] = tile;
      };
      for (int next = blockIdx.x;;
           next = gridDim.x + atomicAdd(workspace.next_item + outgrown, 1)) {
        shared.item_empty[items.slot].wait(items.parity ^ 1);  // until its scores are written
        auto& item = shared.item[items.slot];
        item.index = -1;
        if (next < num_items) {
          const int index = outgrown ? workspace.outgrown_items[next] : next;
          calls.template fill<kKeyStride>(item, params, layout, index);
        }
        shared.outgrown[items.slot] = false;
        shared.item_full[items.slot].arrive();
        if (item.index < 0) break;
        const int64_t first_tile = calls.first_tile_of(item, layout);
        const auto* tiles = workspace.pooled_keys + first_tile * Traits::kKeyTileElements;
        const float* variances = workspace.variances + first_tile * kTileVariances;
        for (int pass = 0; pass < passes; ++pass) {
          for (int tile = 0; tile < item.num_tiles; ++tile) {
            if (hides<kTileStrides * kKeyStride>(item, params, workspace.tile_bounds, tile))
              continue;
            next_slot(tile);
            constexpr uint32_t kVarianceBytes = sizeof(shared.variance[0]);
            shared.key_full[keys.slot].arrive_and_expect(Traits::kKeyTileBytes +
                                                         (spread ? kVarianceBytes : 0));
            SM90_BULK_COPY_G2S::copy(tiles + static_cast<int64_t>(tile) * Traits::kKeyTileElements,
                                     shared.key_full[keys.slot].raw(), shared.key[keys.slot],
                                     Traits::kKeyTileBytes);
            if (spread) {
              SM90_BULK_COPY_G2S::copy(variances + tile * kTileVariances,
                                       shared.key_full[keys.slot].raw(), shared.variance[keys.slot],
                                       kVarianceBytes);
            }
            keys.advance();
          }
          next_slot(-1);
          shared.key_full[keys.slot].arrive();
          keys.advance();
        }
        items.advance();
      }
    } else if (threadIdx.x >= 32) {
      Finisher<Traits, kKeyStride, kFinisherThreads, Calls> finisher(
          params, calls, workspace, shared, threadIdx.x - 32, Traits::kConsumers);
      for (;;) {
        const int slot = items.slot;
        shared.item_full[slot].wait(items.parity);
        if (shared.item[slot].index < 0) break;
        shared.sums_full[slot].wait(items.parity);  // until the consumers are done
        items.advance();
        shared.item_full[items.slot].wait(items.parity);
        const bool last = shared.item[items.slot].index < 0;
        if (shared.outgrown[slot]) {
          if (threadIdx.x == 32) {
            workspace.outgrown_items[atomicAdd(workspace.num_outgrown, 1)] =
                shared.item[slot].index;
          }
        } else if (!last) {
          finisher.finish(slot, 0, Traits::kConsumers);
        }
        finisher.free_item_sums();
        shared.item_empty[slot].arrive();
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int consumer_index = warp_group - 1;
    Consumer<Traits, kKeyStride, Calls> consumer(params, layout, calls, workspace, shared,
                                                 consumer_index);
    RingPosition<kItemSlots> last;
    for (;; items.advance()) {
      shared.item_full[items.slot].wait(items.parity);
      if (shared.item[items.slot].index < 0) break;
      consumer.begin_item(items.slot, aligned);
      for (int pass = 0; pass < passes; ++pass) consumer.take_pass(pass < passes - 1);
      consumer.end_item();
      last = items;
    }
    shared.sums_full[last.slot].wait(last.parity);  // until all consumers are done
    if (!shared.outgrown[last.slot]) {
      Finisher<Traits, kKeyStride, kWarpGroup, Calls>(params, calls, workspace, shared,
                                                      threadIdx.x % kWarpGroup, consumer_index)
          .finish(last.slot, consumer_index, consumer_index + 1);
    }
  }
}

}  // namespace rrattn::cuda::sm90::estimate
