// What S, dP and the sums of dQ start from, and in deterministic mode the units of these sums.
#pragma once

#include "../bit_walk.cuh"
#include "../block_masking.cuh"
#include "row_parts.cuh"

namespace rrattn::cuda::backward {

// The power of 2 that scales numbers of at most `bound` to at most `target`, which is a power of 2
// too. NaN for a bound that is NaN or at least 2^60: then all sums in this unit come out as NaN.
// Bounds below 2^least count as 2^least, so that products of scales stay in the range of float32.
__device__ inline float scale_to(float bound, float target, int least) {
  if (!(bound < 0x1p60f)) return NAN;
  int exponent;
  frexpf(bound, &exponent);  // bound < 2^exponent
  return target * exp2f(static_cast<float>(-max(exponent, least)));
}

// The scale of a query's sums, in deterministic mode. The bound is doubled, for what rounding adds.
// NaN also where lse is not a number: P is not one either then.
__device__ inline float query_scale(float grad_out_norm, float value_norm, float delta, float lse) {
  const float bound = 2 * (sqrtf(grad_out_norm) * sqrtf(value_norm) + fabsf(delta));
  return scale_to(lse < INFINITY ? bound : NAN, 1 << 30, -60);
}

// Whether a query block of a head selected most of the key blocks that it sees. Then its sums start as
// zeros: thread blocks come to it at about the same time, and would wait for one another's first share.
// All lanes of a warp call it together.
__device__ inline bool mostly_selected(const BackwardParams& params, int64_t head, int m_block) {
  const Visibility& visibility = params.visibility;
  const uint32_t* words = params.block_mask + (head * visibility.num_m_blocks() + m_block) *
                                                  visibility.num_mask_words();
  const int seen = end_block(visibility, m_block);
  return count_bits(words, seen) * 8 > seen * 7;
}

// For every row, rows past the end included. The heads of a token, which lie side by side in
// memory, are read at about the same time.
template <typename Element, int kColumns>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows_kernel(const __grid_constant__ BackwardParams params,
                        const __grid_constant__ Workspace workspace, bool aligned) {
  constexpr int kLanes = kRowLanes<kColumns>, kRows = kPrepareRows<kColumns>;
  static_assert(kBlockSize % kRows == 0 && kColumns % kLanes == 0 && kColumns / kLanes <= kRows);
  const Visibility& visibility = params.visibility;
  const auto num_heads = static_cast<unsigned>(visibility.num_heads);
  const auto padded = static_cast<unsigned>(visibility.num_m_blocks()) * kBlockSize;
  const unsigned head = blockIdx.x % num_heads, tile = blockIdx.x / num_heads;
  const int64_t batch = tile / (padded / kRows);
  const unsigned token = tile % (padded / kRows) * kRows + threadIdx.x / kLanes;
  const int64_t row = (batch * num_heads + head) * padded + token;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, column = lane * 8;
  float delta = 0, norm = 0;
  if (token < visibility.seqlen_q) {
    const auto eight = [&](const Rows& rows) {
      return load_part<Element>(rows, batch, head, token, column,
                                static_cast<int>(params.heads.head_dim_v), aligned);
    };
    const uint4 out = eight(params.out), grad_out = eight(params.grad_out);
    for (int e = 0; e < 8; ++e) {
      const float grad = element<Element>(grad_out, e);
      delta += element<Element>(out, e) * grad;
      norm += grad * grad;
    }
  }
  const bool zeros =
      workspace.sums_state == nullptr ||
      mostly_selected(params, batch * num_heads + head, static_cast<int>(token) / kBlockSize);
  if (zeros) {
    auto* sums = reinterpret_cast<uint4*>(workspace.grad_query + row * kColumns) + lane;
    sums[0] = sums[kLanes] = make_uint4(0, 0, 0, 0);  // 8 of the row's
  }
  if (workspace.sums_state != nullptr && lane == 0 && token % workspace.sums_rows == 0) {
    workspace.sums_state[row / workspace.sums_rows] = zeros ? kZerosAtFirst : kNoSums;
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    delta += __shfl_xor_sync(~0u, delta, lanes);
    norm += __shfl_xor_sync(~0u, norm, lanes);
  }
  const unsigned group = num_heads / static_cast<unsigned>(params.heads.num_heads_k);
  const int64_t key_head = batch * params.heads.num_heads_k + head / group;
  if (params.deterministic && token < kColumns / kLanes && head % group == 0) {
    const int64_t at = key_head * kColumns + token * kLanes + lane;
    workspace.key_scale[at] = scale_to(__uint_as_float(workspace.key_column[at]), 1, -30);
  }
  if (lane != 0) return;
  const float lse = token < visibility.seqlen_q
                        ? params.lse[(batch * num_heads + head) * visibility.seqlen_q + token]
                        : -INFINITY;
  const bool sees_nothing = lse == -INFINITY;
  if (params.grad_lse.data != nullptr && !sees_nothing) {
    delta -= params.grad_lse.at(batch, head, token);
  }
  workspace.score_start[row] =
      (sees_nothing ? -INFINITY : -lse) / usable_scale(params.softmax_scale);
  workspace.grad_score_start[row] = sees_nothing ? 0 : -delta;
  if (params.deterministic) {
    workspace.query_scale[row] =
        query_scale(norm, __uint_as_float(workspace.value_norm[key_head]), delta, lse);
  }
}

template <typename Element, int kColumns>
void prepare_rows(const BackwardParams& params, const Workspace& workspace) {
  const auto grid =
      static_cast<unsigned>(num_padded_rows(params.visibility) / kPrepareRows<kColumns>);
  if (grid == 0) return;
  prepare_rows_kernel<Element, kColumns><<<grid, kPrepareThreads, 0, stream_of(params.execution)>>>(
      params, workspace, aligned_rows(params.out) && aligned_rows(params.grad_out));
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::backward
