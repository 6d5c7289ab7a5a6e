// The writer warp of the gradients: adds the consumers' shares of dQ to the sums in the workspace.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

template <typename Traits>
__device__ void add_sums(const KernelParams& params, typename Traits::SharedStorage& shared) {
  constexpr int kTileElements = kQueryTile * Traits::kHeadDim;
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared.grad_query));
  const auto bytes = static_cast<uint32_t>(Traits::kSumsTiles * kTileElements * sizeof(uint32_t));
  RingPosition<Traits::kSumsSlots> tiles;
  for (RingPosition<1> sums;; sums.advance()) {
    shared.sums_full.wait(sums.parity);
    const int tile = shared.sums_tile[tiles.slot];
    if (tile < 0) return;
    for (int i = 0; i < Traits::kSumsTiles; ++i) tiles.advance();
    if (threadIdx.x % 32 == 0) {
      const int first_tile =
          tile - (Traits::kSumsTiles - 1);  // they come from the last to the first
      uint32_t* to = params.workspace.grad_query + static_cast<int64_t>(first_tile) * kTileElements;
      if constexpr (Traits::kDeterministic) {
        asm volatile(
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to),
            "r"(from), "r"(bytes)
            : "memory");
      } else {
        asm volatile(
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
            "r"(from), "r"(bytes)
            : "memory");
      }
      asm volatile(
          "cp.async.bulk.commit_group;\n"
          "cp.async.bulk.wait_group.read 0;" ::
              : "memory");
    }
    __syncwarp();
    shared.sums_empty.arrive();
  }
}

}  // namespace rrattn::cuda::sm90::backward
