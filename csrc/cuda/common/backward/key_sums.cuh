// Sums of dK and dV in the workspace, in float32, where walks are cut into parts. The items of a key
// tile take turns at its sums, in the order of their numbers, so that these are the same bits on
// every run; the last of them stores the gradients, and the slot of the sums is that of a key tile of
// the next round. An item waits only for items of smaller numbers, which running thread blocks took
// before.
#pragma once

#include <cute/tensor.hpp>

#include "work.cuh"

namespace rrattn::cuda::backward {

// The sums of a slot are those of an item's keys, in the order of the accumulators. Groups of
// threads that have other keys or columns take turns on their own: for each slot and group, whose
// turn at the sums it is, times 2, plus 1 if there are any.
struct KeySums {
  float *key = nullptr, *value = nullptr;  // [slots, keys of an item * columns]
  int* tickets = nullptr;                  // [slots, groups]; zeros at the start

  template <typename Traits>
  static KeySums take(Arena& arena, const WorkOrder& order, int groups) {
    if (order.num_parts <= 1) return {};
    const int64_t keys = int64_t{order.num_slots()} * Traits::kKeys;
    return {arena.take<float>(keys * Traits::kHeadDim), arena.take<float>(keys * Traits::kHeadDimV),
            arena.take<int>(order.num_slots() * groups)};
  }
  void clear_tickets(const WorkOrder& order, int groups, cudaStream_t stream) const {
    if (tickets == nullptr) return;
    RRATTN_CUDA_CHECK(
        cudaMemsetAsync(tickets, 0, order.num_slots() * groups * sizeof(int), stream));
  }
};

// Adds sums to a thread's part of a gradient. sums: its first four; the next are kThreads further on.
template <int kThreads, typename Grad>
__device__ inline void add_sums(const float4* sums, Grad& grad) {
#pragma unroll
  for (int i = 0; i < cute::size(grad) / 4; ++i) {
    const float4 four = __ldcg(sums + i * kThreads);
    grad(i * 4) += four.x, grad(i * 4 + 1) += four.y;
    grad(i * 4 + 2) += four.z, grad(i * 4 + 3) += four.w;
  }
}

// Leaves it there as the first sums.
template <int kThreads, typename Grad>
__device__ inline void store_sums(float4* sums, const Grad& grad) {
#pragma unroll
  for (int i = 0; i < cute::size(grad) / 4; ++i) {
    __stcg(sums + i * kThreads,
           make_float4(grad(i * 4), grad(i * 4 + 1), grad(i * 4 + 2), grad(i * 4 + 3)));
  }
}

// A turn of a group of threads at the sums of an item's keys.
template <int kKeys>
class KeyTurn {
 public:
  KeyTurn() = default;  // of an item that is its key tile's only one

  // Waits until it has come. parts_before: those just before the item's part that have no item of
  // their own. `something`: whether the item has anything to add. tickets: KeySums'.
  __device__ KeyTurn(const BackwardParams& params, const WorkOrder& order, int* tickets,
                     const Place<kKeys>& place, int parts_before, bool something, int groups,
                     int group)
      : something_(something) {
    last_ = place.part == order.num_parts - 1;
    if (order.num_parts == 1) return;
    const int num_heads_k = static_cast<int>(params.heads.num_heads_k);
    const int head = place.batch * num_heads_k + place.key_head;
    const int section = head / order.section_heads, round = place.key_tile / order.round_tiles;
    const int tile = place.key_tile % order.round_tiles;
    slot_ = tile * order.section_heads + head % order.section_heads;
    ticket_ = tickets + slot_ * groups + group;
    // In each section the key tiles with this place in a round have the slot, one after the other.
    const int section_rounds = (order.num_key_tiles - 1 - tile) / order.round_tiles + 1;
    const int first_turn = (section * section_rounds + round) * order.num_parts;
    const int turn = first_turn + place.part - parts_before;
    next_turn_ = first_turn + place.part + 1;
    int ticket;
    do {  // acquires what the items before, or whoever had the slot before, wrote and read
      ticket = load_acquire(ticket_);
    } while (ticket / 2 != turn);
    any_sums_ = ticket % 2;
  }

  __device__ bool last() const { return last_; }  // item of the key tile
  __device__ bool something() const { return something_; }
  __device__ bool any_sums() const { return any_sums_; }  // of items before
  __device__ int slot() const { return slot_; }

  // Gives the next item its turn. One thread calls it, behind a barrier of the group: all have
  // written to the sums then, or read them.
  __device__ void end() const {
    const int ticket = next_turn_ * 2 + (!last_ && (any_sums_ || something_));
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(ticket_), "r"(ticket) : "memory");
  }

 private:
  bool something_ = true, last_ = true, any_sums_ = false;
  int slot_ = 0, next_turn_ = 0;
  int* ticket_ = nullptr;
};

}  // namespace rrattn::cuda::backward
