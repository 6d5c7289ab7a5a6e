// From the accumulators of dK and dV to memory: as grad_key and grad_value, or, where walks are cut
// into parts, by way of sums in the workspace, in float32. The items of a key tile take turns at
// its sums, in the order of their numbers, so that these are the same bits on every run; the last of
// them stores the gradients, and the slot of the sums is that of a key tile of the next round. An
// item waits only for items of smaller numbers, which running thread blocks took before.
#pragma once

#include "../../common/store_row.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

// The threads that hold dK, or dV, of an item's keys.
template <typename Traits>
constexpr int kThreadsOfKeys = Traits::kKeys * 2;

// A thread's first key of the item's; its second is 8 further on.
template <typename Traits>
__device__ inline int key_row_of(int thread) {
  return thread % kThreadsOfKeys<Traits> / 32 * 16 + thread % 32 / 4;
}

// Where a gradient of keys or values goes.
struct GradKeyTarget {
  const Rows& rows;
  float* sums;  // as KeySums says
  float scale;
  int head_dim;
  bool aligned;

  __device__ static GradKeyTarget key(const KernelParams& params) {
    const BackwardParams& backward = params.backward;
    return {backward.grad_key, params.key_sums.key, backward.softmax_scale,
            static_cast<int>(backward.heads.head_dim), params.aligned_grad_key};
  }
  __device__ static GradKeyTarget value(const KernelParams& params) {
    const BackwardParams& backward = params.backward;
    return {backward.grad_value, params.key_sums.value, 1,
            static_cast<int>(backward.heads.head_dim_v), params.aligned_grad_value};
  }
};

// Stores the thread's rows.
template <typename Traits, typename Grad>
__device__ void store_rows(const GradKeyTarget& target, const Place<Traits::kKeys>& place,
                           int64_t seqlen_k, int thread, const Grad& grad) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t key = place.first_key() + key_row_of<Traits>(thread) + half * 8;
    Element* row = static_cast<Element*>(target.rows.data) +
                   place.batch * target.rows.batch_stride +
                   place.key_head * target.rows.head_stride + key * target.rows.row_stride;
    store_row(grad, half, target.scale, row, key < seqlen_k, target.head_dim, target.aligned);
  }
}

// A consumer's turn, with all threads of its warp group, at dK and dV of its keys, or at one of
// them. Consumers have tickets of their own, since none adds to sums of another.
template <typename Traits>
class Turn {
 public:
  // Waits until it has come. `something`: whether the item adds anything.
  __device__ Turn(const KernelParams& params, const Place<Traits::kKeys>& place, bool something,
                  int thread)
      : params_(params), place_(place), something_(something), thread_(thread) {
    const WorkOrder& order = params.order;
    last_ = place.part == order.num_parts - 1;
    if (order.num_parts == 1) return;
    const int num_heads_k = static_cast<int>(params.backward.heads.num_heads_k);
    const int head = place.batch * num_heads_k + place.key_head;
    const int section = head / order.section_heads, round = place.key_tile / order.round_tiles;
    const int tile = place.key_tile % order.round_tiles;
    slot_ = tile * order.section_heads + head % order.section_heads;
    ticket_ = params.key_sums.tickets + slot_ * kConsumers + thread / kWarpGroup;
    // In each section the key tiles with this place in a round have the slot, one after the other.
    const int section_rounds = (order.num_key_tiles - 1 - tile) / order.round_tiles + 1;
    const int first_turn = (section * section_rounds + round) * order.num_parts;
    const int first_window = place.first_window(params.backward.visibility, order);
    const int turn = first_turn + place.part / order.windows * (order.windows - first_window) +
                     place.window(order) - first_window;
    next_turn_ = last_ ? first_turn + order.num_parts : turn + 1;
    int ticket;
    do {  // acquires what the items before, or whoever had the slot before, wrote and read
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(ticket) : "l"(ticket_) : "memory");
    } while (ticket / 2 != turn);
    any_sums_ = ticket % 2;
  }

  // Adds to a gradient. The last item of the key tile stores it.
  template <typename Grad>
  __device__ void add(const GradKeyTarget& target, Grad& grad) const {
    constexpr int kFours = decltype(size(grad))::value / 4;
    constexpr int kThreads = kThreadsOfKeys<Traits>;
    float4* sums = reinterpret_cast<float4*>(target.sums) +
                   static_cast<int64_t>(slot_) * (kFours * kThreads) + thread_ % kThreads;
    if (last_) {
      if (any_sums_) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          const float4 four = __ldcg(sums + i * kThreads);
          grad(i * 4) += four.x, grad(i * 4 + 1) += four.y;
          grad(i * 4 + 2) += four.z, grad(i * 4 + 3) += four.w;
        }
      }
      store_rows<Traits>(target, place_, params_.backward.visibility.seqlen_k, thread_, grad);
    } else if (something_) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 four =
            make_float4(grad(i * 4), grad(i * 4 + 1), grad(i * 4 + 2), grad(i * 4 + 3));
        if (any_sums_) {
          atomicAdd(sums + i * kThreads, four);
        } else {
          __stcg(sums + i * kThreads, four);
        }
      }
    }
  }

  // Gives the next item its turn.
  __device__ void end() const {
    if (params_.order.num_parts == 1) return;
    // All threads of the warp group have written to the sums, or read them.
    cutlass::arch::NamedBarrier::sync(kWarpGroup, 1 + thread_ / kWarpGroup);
    if (thread_ % kWarpGroup == 0) {
      const int ticket = next_turn_ * 2 + (!last_ && (any_sums_ || something_));
      asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(ticket_), "r"(ticket) : "memory");
    }
  }

 private:
  const KernelParams& params_;
  const Place<Traits::kKeys>& place_;
  const bool something_;   // to add
  const int thread_;       // of both consumers
  bool last_;              // item of the key tile
  bool any_sums_ = false;  // of items before
  int slot_ = 0, next_turn_ = 0;
  int* ticket_ = nullptr;
};

}  // namespace rrattn::cuda::sm90::backward
