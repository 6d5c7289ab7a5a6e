// From the accumulators of dK and dV to memory: as grad_key and grad_value, or, where walks are cut
// into parts, by way of sums in the workspace (common/backward/key_sums.cuh).
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

// Adds to a gradient of an item's keys, or values. The last item of the key tile stores it.
template <typename Traits, typename Grad>
__device__ void add_to(const GradKeyTarget& target, const KernelParams& params,
                       const Turn<Traits::kKeys>& turn, int thread, Grad& grad) {
  constexpr int kFours = decltype(size(grad))::value / 4;
  constexpr int kThreads = kThreadsOfKeys<Traits>;
  float4* sums = reinterpret_cast<float4*>(target.sums) +
                 static_cast<int64_t>(turn.slot) * (kFours * kThreads) + thread % kThreads;
  if (turn.last) {
    if (turn.any_sums) cuda::backward::add_sums<kThreads>(sums, grad);
    store_rows<Traits>(target, turn.place, params.backward.visibility.seqlen_k, thread, grad);
  } else if (turn.something) {
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 four =
          make_float4(grad(i * 4), grad(i * 4 + 1), grad(i * 4 + 2), grad(i * 4 + 3));
      if (turn.any_sums) {
        atomicAdd(sums + i * kThreads, four);
      } else {
        __stcg(sums + i * kThreads, four);
      }
    }
  }
}

}  // namespace rrattn::cuda::sm90::backward
