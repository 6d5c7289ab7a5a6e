// The writer warp of the gradients: adds the consumers' shares of dQ to the sums in the workspace.
// The first share of most tiles is stored, so that no zeros have to be written and read before.
#pragma once

#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

// Waits until there are sums to add to. False: there are none yet, and the caller is to store the
// first. found: the state a while ago.
__device__ inline bool wait_for_sums(int* state, int found) {
  if (found == kZerosAtFirst) return true;
  if (found == kNoSums) {
    found = atomicCAS(state, kNoSums, kFirstUnderWay);
    if (found == kNoSums) return false;
  }
  while (found != kSums) found = load_acquire(state);
  asm volatile("fence.proxy.async.global;" ::: "memory");  // before the bulk copy that adds
  return true;
}

// Says that there are, once the caller's bulk copy, which stores them, is done.
__device__ inline void publish_sums(int* state) {
  asm volatile(
      "cp.async.bulk.wait_group 0;\n"
      "fence.proxy.async.global;\n"
      "st.release.gpu.global.b32 [%0], %1;" ::"l"(state),
      "r"(static_cast<int>(kSums))
      : "memory");
}

// Stores the first share of a tile, or adds another.
template <typename Traits>
__device__ inline void send_sums(uint32_t* to, uint32_t from, bool first_share) {
  constexpr uint32_t kBytes = Traits::kSumsRows * Traits::kHeadDim * sizeof(uint32_t);
  if (first_share) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "n"(kBytes)
                 : "memory");
  } else if constexpr (Traits::kDeterministic) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "n"(kBytes)
        : "memory");
  } else {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "n"(kBytes)
        : "memory");
  }
  asm volatile(
      "cp.async.bulk.commit_group;\n"
      "cp.async.bulk.wait_group.read 0;" ::
          : "memory");
}

template <typename Traits>
__device__ void add_sums(const KernelParams& params, typename Traits::SharedStorage& shared) {
  int* states = params.workspace.sums_state;
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared.grad_query));
  RingPosition<Traits::kQuerySlots> steps;
  for (RingPosition<1> sums;; sums.advance()) {
    shared.query_full[steps.slot].wait(steps.parity);
    // The first of the tiles that are sent at once, which come from the last to the first.
    const int tile = shared.sums_tile[steps.slot] - (Traits::kSumsTiles - 1);
    for (int i = 0; i < Traits::kSumsTiles; ++i) steps.advance();
    __syncwarp();
    shared.sums_empty.arrive();  // the consumers may write dQ of these, and then free their slots
    if (tile < 0) return;
    int* state = states + tile / Traits::kSumsTiles;
    const int found = load_acquire(state);  // while dQ is computed
    shared.sums_full.wait(sums.parity);
    if (threadIdx.x % 32 != 0) continue;
    const bool first_share = !wait_for_sums(state, found);
    send_sums<Traits>(
        params.workspace.grad_query + static_cast<int64_t>(tile) * (kQueryTile * Traits::kHeadDim),
        from, first_share);
    // Before this warp waits for anything: others wait for it, and their items' turns for theirs.
    if (first_share) publish_sums(state);
  }
}

}  // namespace rrattn::cuda::sm90::backward
