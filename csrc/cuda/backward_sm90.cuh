// Gradients of block-sparse attention on Hopper.
//
//   query, grad_out [B, Lq, Hq, D], key, value [B, Lk, Hkv, D], block_mask [B, Hq, Mq, words]
//     ->  grad_query [B, Lq, Hq, D], grad_key, grad_value [B, Lk, Hkv, D]
//
// There are three steps:
//
//   prepare          Computes what S and dP start from, -lse / scale and -delta = -rowsum(dO * O);
//                    sets the sums of dQ to 0; if deterministic, finds their units; transposes the
//                    block mask.
//   backward_kernel  Persistent. A thread block takes a key block of a key head, walks the query
//                    blocks of the group's heads that selected it, keeps dK and dV in registers,
//                    and adds its share of dQ to the sums in the workspace.
//   finish           Writes these sums, scaled, as grad_query.
#pragma once

#include "backward_consumer.cuh"
#include "backward_writer.cuh"
#include "rows.cuh"

namespace rrattn::cuda {

constexpr int kPrepareThreads = 256;
constexpr int kRowLanes = 16;  // threads of a row, with 8 columns each
constexpr int kPrepareRows = kPrepareThreads / kRowLanes;
constexpr int kKeyChunks = 64;  // thread blocks that share the keys of a head

// The power of 2 that scales numbers of at most `bound` to at most `target`, which is a power of 2
// too. NaN for a bound that is NaN or at least 2^60: then all sums in this unit come out as NaN.
// Bounds below 2^least count as 2^least, so that products of scales stay in the range of float32.
__device__ inline float scale_to(float bound, float target, int least) {
  if (!(bound < 0x1p60f)) return NAN;
  int exponent;
  frexpf(bound, &exponent);  // bound < 2^exponent
  return target * exp2f(static_cast<float>(-max(exponent, least)));
}

// Finds the largest |K| of each column and the largest |V_j|^2 among the keys that any query sees.
// A NaN counts as the largest: its bits are above those of all numbers.
template <typename Element>
__global__ void __launch_bounds__(kPrepareThreads)
    bound_keys_kernel(const __grid_constant__ BackwardKernelParams params, bool aligned) {
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int head_dim = static_cast<int>(backward.heads.head_dim);
  const int64_t key_head = blockIdx.y;  // of all batch entries
  const int64_t head = key_head % backward.heads.num_heads_k;
  const int64_t batch = key_head / backward.heads.num_heads_k;
  const int64_t group = visibility.num_heads / backward.heads.num_heads_k;
  const int column = static_cast<int>(threadIdx.x) % kRowLanes * 8;
  const int row = static_cast<int>(threadIdx.x) / kRowLanes;
  const auto eight = [&](const Rows& rows, int64_t key) {
    return load_eight(static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
                          head * rows.head_stride + key * rows.row_stride,
                      column, head_dim, aligned);
  };
  __shared__ uint32_t block_largest[128], block_largest_norm;
  if (threadIdx.x < 128) block_largest[threadIdx.x] = 0;
  if (threadIdx.x == 128) block_largest_norm = 0;
  __syncthreads();
  uint32_t largest[8] = {}, largest_norm = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kPrepareRows; first < visibility.seqlen_k;
       first += static_cast<int64_t>(gridDim.x) * kPrepareRows) {
    const bool inside = first + row < visibility.seqlen_k &&
                        seen_by_group(visibility, group, batch, head, first + row);
    const uint4 none = make_uint4(0, 0, 0, 0);
    const uint4 keys = inside ? eight(backward.key, first + row) : none;
    const uint4 values = inside ? eight(backward.value, first + row) : none;
    float norm = 0;
    for (int e = 0; e < 8; ++e) {
      const float value = static_cast<float>(reinterpret_cast<const Element*>(&values)[e]);
      norm += value * value;
      largest[e] = max(
          largest[e],
          __float_as_uint(fabsf(static_cast<float>(reinterpret_cast<const Element*>(&keys)[e]))));
    }
    for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
      norm += __shfl_xor_sync(~0u, norm, lanes);
    }
    largest_norm = max(largest_norm, __float_as_uint(fabsf(norm)));
  }
  for (int e = 0; e < 8; ++e) atomicMax(block_largest + column + e, largest[e]);
  atomicMax(&block_largest_norm, largest_norm);
  __syncthreads();
  if (threadIdx.x < 128) {
    atomicMax(params.workspace.key_column + key_head * 128 + threadIdx.x,
              block_largest[threadIdx.x]);
  }
  if (threadIdx.x == 128) atomicMax(params.workspace.value_norm + key_head, block_largest_norm);
}

// Writes what S, dP and the sums of dQ start from, for every row, rows past the end included; in
// deterministic mode the scales too. The heads of a token, which lie side by side in memory, are
// read at about the same time.
template <typename Element>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows_kernel(const __grid_constant__ BackwardKernelParams params, bool aligned) {
  const BackwardParams& backward = params.backward;
  const BackwardWorkspace& workspace = params.workspace;
  const Visibility& visibility = backward.visibility;
  const auto num_heads = static_cast<unsigned>(visibility.num_heads);
  const auto padded = static_cast<unsigned>(visibility.num_m_blocks()) * kBlockSize;
  const unsigned head = blockIdx.x % num_heads, tile = blockIdx.x / num_heads;
  const int64_t batch = tile / (padded / kPrepareRows);
  const unsigned token = tile % (padded / kPrepareRows) * kPrepareRows + threadIdx.x / kRowLanes;
  const int64_t row = (batch * num_heads + head) * padded + token;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes, column = lane * 8;
  auto* sums = reinterpret_cast<uint4*>(workspace.grad_query + row * 128) + lane;
  sums[0] = sums[kRowLanes] = make_uint4(0, 0, 0, 0);  // 8 of the row's 128
  float delta = 0, norm = 0;
  if (token < visibility.seqlen_q) {
    const auto eight = [&](const Rows& rows) {
      return load_eight(static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
                            head * rows.head_stride + token * rows.row_stride,
                        column, static_cast<int>(backward.heads.head_dim), aligned);
    };
    const uint4 out = eight(backward.out), grad_out = eight(backward.grad_out);
    for (int e = 0; e < 8; ++e) {
      const float grad = static_cast<float>(reinterpret_cast<const Element*>(&grad_out)[e]);
      delta += static_cast<float>(reinterpret_cast<const Element*>(&out)[e]) * grad;
      norm += grad * grad;
    }
  }
  for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
    delta += __shfl_xor_sync(~0u, delta, lanes);
    norm += __shfl_xor_sync(~0u, norm, lanes);
  }
  const unsigned group = num_heads / static_cast<unsigned>(backward.heads.num_heads_k);
  const int64_t key_head = batch * backward.heads.num_heads_k + head / group;
  if (backward.deterministic && token < 128 / kRowLanes && head % group == 0) {
    const int64_t at = key_head * 128 + token * kRowLanes + lane;
    workspace.key_scale[at] = scale_to(__uint_as_float(workspace.key_column[at]), 1, -30);
  }
  if (lane != 0) return;
  const float lse = token < visibility.seqlen_q
                        ? backward.lse[(batch * num_heads + head) * visibility.seqlen_q + token]
                        : -INFINITY;
  const bool sees_nothing = lse == -INFINITY;
  workspace.score_start[row] =
      (sees_nothing ? -INFINITY : -lse) / usable_scale(backward.softmax_scale);
  workspace.grad_score_start[row] = sees_nothing ? 0 : -delta;
  if (backward.deterministic) {
    // Doubled, for what rounding adds. NaN also where lse is not a number: P is not one either
    // then.
    const float value_norm = __uint_as_float(workspace.value_norm[key_head]);
    const float bound = 2 * (sqrtf(norm) * sqrtf(value_norm) + fabsf(delta));
    workspace.query_scale[row] = scale_to(lse < INFINITY ? bound : NAN, 1 << 30, -60);
  }
}

// [B, Hq, Mq, words] -> [B, Hq, Mk, words]; a warp takes 32 query blocks by 32 key blocks.
static __global__ void transpose_mask_kernel(const __grid_constant__ BackwardKernelParams params) {
  const Visibility& visibility = params.backward.visibility;
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_n_blocks = static_cast<int>(visibility.num_n_blocks());
  const int num_m_words = (num_m_blocks + kMaskWordBits - 1) / kMaskWordBits;
  const int num_n_words = static_cast<int>(visibility.num_mask_words());
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (warp >= visibility.batch * visibility.num_heads * num_m_words * num_n_words) return;
  const int n_word = static_cast<int>(warp % num_n_words);
  const int m_word = static_cast<int>(warp / num_n_words % num_m_words);
  const int64_t head = warp / num_n_words / num_m_words;  // of all batch entries
  const int lane = threadIdx.x % 32, m_block = m_word * 32 + lane, n_block = n_word * 32 + lane;
  const uint32_t word =
      m_block < num_m_blocks
          ? params.backward.block_mask[(head * num_m_blocks + m_block) * num_n_words + n_word]
          : 0;
  uint32_t transposed = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t column = __ballot_sync(~0u, word >> bit & 1);
    if (lane == bit) transposed = column;
  }
  if (n_block < num_n_blocks) {
    params.workspace.transposed_mask[(head * num_n_blocks + n_block) * num_m_words + m_word] =
        transposed;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardKernelParams params) {
  extern __shared__ char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  const int warp_group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpGroup, 0);
  if (threadIdx.x == 0) {
    shared.any_not_finite = false;
    shared.item_full.init(1);
    shared.item_empty.init(kBackwardThreads);
    for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
      shared.query_full[stage].init(1);
      shared.query_empty[stage].init(kBackwardThreads);
    }
    for (int stage = 0; stage < Traits::kGradOutStages; ++stage) {
      shared.grad_out_full[stage].init(1);
      shared.grad_out_empty[stage].init(kBackwardThreads);
    }
    for (Barrier& full : shared.grad_scores_full) full.init(kBackwardThreads);
    shared.sums_full.init(kBackwardThreads);
    shared.sums_empty.init(32);  // the writer
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (warp_group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) produce_steps<Traits>(params, shared);
    if (threadIdx.x / 32 == 1) add_sums<Traits>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    BackwardConsumer<Traits>(params, shared, warp_group - 1).consume_items();
  }
}

// A thread block takes one tile of the sums, in the order of the accumulators of both groups.
template <typename Traits>
__global__ void __launch_bounds__(kBackwardThreads)
    finish_grad_query_kernel(const __grid_constant__ BackwardKernelParams params) {
  using Element = typename Traits::Element;
  constexpr int kValues = kQueryTile * Traits::kHeadDim / kBackwardThreads;
  const BackwardParams& backward = params.backward;
  const Visibility& visibility = backward.visibility;
  const int64_t tiles = visibility.num_m_blocks() * kQueryTiles;
  const int64_t head = blockIdx.x / tiles % visibility.num_heads;
  const int64_t batch = blockIdx.x / tiles / visibility.num_heads;
  const uint32_t* from = params.workspace.grad_query +
                         static_cast<int64_t>(blockIdx.x) * (kQueryTile * Traits::kHeadDim) +
                         threadIdx.x * 4;
  auto sums = make_tensor<float>(Shape<Int<kValues>>{});
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i * kBackwardThreads);
    sums(i) = four.x, sums(i + 1) = four.y, sums(i + 2) = four.z, sums(i + 3) = four.w;
  }
  // Group g has the columns from g * 64 on.
  const int first_column = static_cast<int>(threadIdx.x) / kWarpGroup * (Traits::kHeadDim / 2);
  const int row_in_tile =
      static_cast<int>(threadIdx.x) % kWarpGroup / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  if constexpr (Traits::kDeterministic) {
    const int64_t key_head = batch * backward.heads.num_heads_k +
                             head / (visibility.num_heads / backward.heads.num_heads_k);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float query_scale =
          params.workspace.query_scale[static_cast<int64_t>(blockIdx.x) * kQueryTile + row_in_tile +
                                       i % 4 / 2 * 8];
      const float key_scale =
          params.workspace.key_scale[key_head * Traits::kHeadDim + first_column + i / 4 * 8 +
                                     threadIdx.x % 4 * 2 + i % 2];
      sums(i) = static_cast<float>(__float_as_int(sums(i))) / query_scale / key_scale;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = blockIdx.x % tiles * kQueryTile + row_in_tile + half * 8;
    Element* row = static_cast<Element*>(backward.grad_query.data) +
                   batch * backward.grad_query.batch_stride +
                   head * backward.grad_query.head_stride + token * backward.grad_query.row_stride;
    store_row(sums, half, backward.softmax_scale, row + first_column, token < visibility.seqlen_q,
              static_cast<int>(backward.heads.head_dim) - first_column, params.aligned_grad_query);
  }
}

// Bytes of the queries, dO and sums of dQ of a section. At short lengths that is several key heads,
// so that the thread blocks are done at about the same time: see docs/tuning.md.
constexpr int64_t kBackwardSectionBytes = 64 << 20;

template <typename Traits>
void launch_backward(const BackwardParams& backward) {
  using Element = typename Traits::Element;
  const auto stream = static_cast<cudaStream_t>(backward.execution.stream);
  const Visibility& visibility = backward.visibility;
  const int multiprocessors = num_multiprocessors();
  Arena arena(backward.execution.workspace);
  const BackwardWorkspace workspace(arena, backward);
  compute_run_bounds(visibility, kBlockSize, workspace.block_bounds, stream);
  const int64_t num_heads = visibility.batch * visibility.num_heads;
  const int64_t key_heads = visibility.batch * backward.heads.num_heads_k;
  const int64_t rows = num_heads * visibility.num_m_blocks() * kBlockSize;
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.next_item, 0, sizeof(int), stream));

  const TensorShape query_shape = query_shape_of(visibility, backward.heads);
  const TensorShape key_shape = key_shape_of(visibility, backward.heads);
  const int64_t row_bytes = Traits::kHeadDim * (2 * sizeof(Element) + sizeof(float));
  const int64_t head_bytes = rows / std::max<int64_t>(1, key_heads) * row_bytes;
  const BackwardKernelParams params{
      backward,
      map_rows(backward.query, query_shape, workspace.query, kQueryTile, stream),
      map_rows(backward.key, key_shape, workspace.key, kBlockSize, stream),
      map_rows(backward.value, key_shape, workspace.value, kBlockSize, stream),
      map_rows(backward.grad_out, query_shape, workspace.grad_out, kQueryTile, stream),
      workspace,
      static_cast<int>(key_heads * visibility.num_n_blocks()),
      heads_in_section(kBackwardSectionBytes, head_bytes, key_heads),
      aligned_rows(backward.grad_key),
      aligned_rows(backward.grad_value),
      aligned_rows(backward.grad_query)};

  const auto blocks = [](int64_t threads, int block) {
    return static_cast<unsigned>(ceil_div(threads, block));
  };
  if (backward.deterministic && key_heads > 0) {
    RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.key_column, 0,
                                      key_heads * Traits::kHeadDim * sizeof(uint32_t), stream));
    RRATTN_CUDA_CHECK(
        cudaMemsetAsync(workspace.value_norm, 0, key_heads * sizeof(uint32_t), stream));
    const dim3 grid(kKeyChunks, static_cast<unsigned>(key_heads));
    bound_keys_kernel<Element><<<grid, kPrepareThreads, 0, stream>>>(
        params, aligned_rows(backward.key) && aligned_rows(backward.value));
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (rows > 0) {
    prepare_rows_kernel<Element><<<blocks(rows, kPrepareRows), kPrepareThreads, 0, stream>>>(
        params, aligned_rows(backward.out) && aligned_rows(backward.grad_out));
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (params.num_items > 0) {
    const int64_t warps = num_heads * ceil_div(visibility.num_m_blocks(), kMaskWordBits) *
                          visibility.num_mask_words();
    if (warps > 0) {
      transpose_mask_kernel<<<blocks(warps * 32, kPrepareThreads), kPrepareThreads, 0, stream>>>(
          params);
      RRATTN_CUDA_CHECK(cudaGetLastError());
    }
    constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
    const auto kernel = backward_kernel<Traits>;
    RRATTN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<std::min(params.num_items, multiprocessors), Traits::kThreads, kSharedBytes, stream>>>(
        params);
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  if (rows > 0) {
    finish_grad_query_kernel<Traits>
        <<<blocks(rows, kQueryTile), kBackwardThreads, 0, stream>>>(params);
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace rrattn::cuda
