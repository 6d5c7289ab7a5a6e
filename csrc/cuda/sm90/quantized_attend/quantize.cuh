// From queries, keys and values to the tiles of eight bits in the workspace, as docs/quantization.md
// says. Three kernels, one after the other:
//
//   survey    the mean key of each key head, and the largest magnitude of each column of its values
//   keys      the tiles of keys and of values, a thread block for each pair of them
//   queries   the tiles of queries, and the scales of values for the end
//
// In each a thread has eight columns, 16 bytes, of some rows of a block, and neighbouring threads the
// other columns of the same rows. Past the head size and past the end of a sequence there are zeros.
#pragma once

#include "config.cuh"
// config.cuh comes first
#include "../../common/heads.cuh"
#include "../../common/rows.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

constexpr int kQuantizeThreads = 256;

// What the kernels are launched with.
template <int kHeadDim>
struct QuantizeParams {
  AttendParams attend;
  Workspace<kHeadDim> workspace;
  bool aligned_query, aligned_key, aligned_value;
};

// The threads of a block over the rows and columns of a tile.
template <int kHeadDim>
struct TileThreads {
  static constexpr int kChunks = kHeadDim / 8;  // of eight columns
  static constexpr int kRowStep = kQuantizeThreads / kChunks;
  static constexpr int kRows = kBlockSize / kRowStep;  // of a thread
  int column, first_row;

  __device__ TileThreads()
      : column(static_cast<int>(threadIdx.x) % kChunks * 8),
        first_row(static_cast<int>(threadIdx.x) / kChunks) {}
  __device__ int row(int r) const { return first_row + r * kRowStep; }
};

// A block of the rows of a head.
template <typename Element>
struct HeadRows {
  const Element* data;
  int64_t row_stride;
  int num_rows, head_dim;
  bool aligned;

  __device__ HeadRows(const Rows& rows, int64_t batch, int64_t head, int64_t first_row,
                      int64_t seqlen, int64_t head_dim, bool aligned)
      : data(static_cast<const Element*>(rows.data) + batch * rows.batch_stride +
             head * rows.head_stride + first_row * rows.row_stride),
        row_stride(rows.row_stride),
        num_rows(static_cast<int>(min(seqlen - first_row, int64_t{kBlockSize}))),
        head_dim(static_cast<int>(head_dim)),
        aligned(aligned) {}

  __device__ uint4 load(int row, int column) const {
    return row < num_rows ? load_eight(data + row * row_stride, column, head_dim, aligned)
                          : make_uint4(0, 0, 0, 0);
  }
};

// The largest magnitude of the row that neighbouring threads have eight columns each of; infinite
// where one of these is infinite or NaN.
template <int kLanes>
__device__ inline float row_largest(const float (&eight)[8]) {
  float largest = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e)
    largest = isfinite(eight[e]) ? fmaxf(largest, fabsf(eight[e])) : INFINITY;
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  return largest;
}

// The nearest whole numbers to eight times the factor. Products are rounded first.
__device__ inline uint2 to_int8(const float (&eight)[8], float factor) {
  uint32_t words[2] = {};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int number = __float2int_rn(__fmul_rn(eight[e], factor));
    words[e / 4] |= (static_cast<uint32_t>(number) & 0xff) << e % 4 * 8;
  }
  return make_uint2(words[0], words[1]);
}

// The number of e4m3 nearest to x; NaN where x is not finite.
__device__ inline uint32_t value_to_e4m3(float x) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(x));
  return isfinite(x) ? pair : 0x7f;
}

// Marks the keys of a block that some query of the group sees. All threads call it together.
__device__ inline void mark_seen(const AttendParams& attend, int64_t batch, int64_t key_head,
                                 int64_t first_key, bool (&seen)[kBlockSize]) {
  if (threadIdx.x < kBlockSize) {
    const int64_t key = first_key + threadIdx.x;
    seen[threadIdx.x] =
        key < attend.visibility.seqlen_k &&
        seen_by_group(attend.visibility, group_size(attend.visibility, attend.heads), batch,
                      key_head, key);
  }
  __syncthreads();
}

// The mean of the finite keys that a query sees, of the first block that has any; zeros where none
// has. Called by a whole thread block.
template <typename Element, int kHeadDim>
__device__ void find_mean_key(const QuantizeParams<kHeadDim>& params, int64_t batch,
                              int64_t key_head, float* mean) {
  __shared__ bool counts[kBlockSize];
  const AttendParams& attend = params.attend;
  const Visibility& visibility = attend.visibility;
  const TileThreads<kHeadDim> threads;
  const int column = static_cast<int>(threadIdx.x);
  for (int64_t first_key = 0; first_key < visibility.seqlen_k; first_key += kBlockSize) {
    mark_seen(attend, batch, key_head, first_key, counts);
    const HeadRows<Element> keys(attend.key, batch, key_head, first_key, visibility.seqlen_k,
                                 attend.heads.head_dim, params.aligned_key);
#pragma unroll
    for (int r = 0; r < threads.kRows; ++r) {
      const uint4 eight = keys.load(threads.row(r), threads.column);
      bool finite = true;
#pragma unroll
      for (int e = 0; e < 8; ++e) finite &= isfinite(element<Element>(eight, e));
      if (!finite) counts[threads.row(r)] = false;
    }
    __syncthreads();
    if (__syncthreads_or(counts[column % kBlockSize])) {
      if (column < kHeadDim) {
        double sum = 0;
        int count = 0;
#pragma unroll 8
        for (int row = 0; row < kBlockSize; ++row) {
          if (!counts[row]) continue;
          if (column < keys.head_dim)
            sum += static_cast<float>(keys.data[row * keys.row_stride + column]);
          ++count;
        }
        mean[column] = static_cast<float>(sum / count);
      }
      return;
    }
  }
  if (column < kHeadDim) mean[column] = 0;
}

// The first thread block of a head finds the mean key, the others have a block of values each.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    survey_kernel(const __grid_constant__ QuantizeParams<kHeadDim> params) {
  const int64_t key_head = blockIdx.y, batch = blockIdx.z;
  const int64_t head = batch * gridDim.y + key_head;
  if (blockIdx.x == 0) {
    find_mean_key<Element>(params, batch, key_head, params.workspace.mean_key + head * kHeadDim);
    return;
  }
  __shared__ bool seen[kBlockSize];
  __shared__ uint32_t largest_values[kHeadDim];
  const AttendParams& attend = params.attend;
  const TileThreads<kHeadDim> threads;
  const int64_t first_key = (static_cast<int64_t>(blockIdx.x) - 1) * kBlockSize;
  const HeadRows<Element> values(attend.value, batch, key_head, first_key,
                                 attend.visibility.seqlen_k, attend.heads.head_dim_v,
                                 params.aligned_value);
  uint4 eights[threads.kRows];
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) eights[r] = values.load(threads.row(r), threads.column);
  if (threadIdx.x < kHeadDim) largest_values[threadIdx.x] = 0;
  mark_seen(attend, batch, key_head, first_key, seen);
  float largest[8] = {};
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) {
    if (!seen[threads.row(r)]) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float x = element<Element>(eights[r], e);
      if (isfinite(x)) largest[e] = fmaxf(largest[e], fabsf(x));
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e)
    atomicMax(&largest_values[threads.column + e], __float_as_uint(largest[e]));
  __syncthreads();
  if (threadIdx.x < kHeadDim) {
    atomicMax(&params.workspace.largest_values[head * kHeadDim + threadIdx.x],
              largest_values[threadIdx.x]);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_keys_kernel(const __grid_constant__ QuantizeParams<Traits::kHeadDim> params) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kWords = kBlockSize / 4;  // of a column of values
  __shared__ bool seen[kBlockSize];
  __shared__ bool bad_key[kBlockSize];
  __shared__ uint32_t columns[kHeadDim][kWords];
  const AttendParams& attend = params.attend;
  const TileThreads<kHeadDim> threads;
  const int64_t n_block = blockIdx.x, key_head = blockIdx.y, batch = blockIdx.z;
  const int64_t head = batch * gridDim.y + key_head;
  const int64_t first_key = n_block * kBlockSize, seqlen_k = attend.visibility.seqlen_k;
  const HeadRows<Element> keys(attend.key, batch, key_head, first_key, seqlen_k,
                               attend.heads.head_dim, params.aligned_key);
  const HeadRows<Element> values(attend.value, batch, key_head, first_key, seqlen_k,
                                 attend.heads.head_dim_v, params.aligned_value);
  uint4 eights[threads.kRows];
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) eights[r] = keys.load(threads.row(r), threads.column);
  mark_seen(attend, batch, key_head, first_key, seen);

  float mean[8];
#pragma unroll
  for (int e = 0; e < 8; ++e)
    mean[e] = params.workspace.mean_key[head * kHeadDim + threads.column + e];
  KeyTile<kHeadDim>& key_tile =
      params.workspace.key_tiles[head * attend.visibility.num_n_blocks() + n_block];
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) {
    const int row = threads.row(r);
    float eight[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) eight[e] = seen[row] ? element<Element>(eights[r], e) - mean[e] : 0;
    float largest = row_largest<threads.kChunks>(eight);
    const bool bad = !isfinite(largest);
    if (bad) {
      largest = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) eight[e] = 0;
    }
    *reinterpret_cast<uint2*>(key_tile.numbers +
                              typename Traits::KeyOffsets{}(row, threads.column)) =
        to_int8(eight, int8_inverse(largest));
    if (threads.column == 0) {
      key_tile.scale[position_of_key(row)] = largest / kLargestInt8;
      bad_key[row] = bad;
    }
  }
  __syncthreads();

  // A thread has the four keys of neighbouring positions, which are a word of each of its columns.
  float scale[8];  // the inverse: also a power of two
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int64_t at = head * kHeadDim + threads.column + e;
    scale[e] = ldexpf(1, -value_exponent(__uint_as_float(params.workspace.largest_values[at])));
  }
#pragma unroll
  for (int i = 0; i < threads.kRows / 4; ++i) {
    const int word = threads.row(i);
    uint32_t bytes[8] = {};
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int row = key_of_position(word * 4 + p);
      const uint4 eight = values.load(row, threads.column);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const uint32_t number = bad_key[row] ? 0x7f
                                : seen[row]  ? value_to_e4m3(element<Element>(eight, e) * scale[e])
                                             : 0;
        bytes[e] |= number << p * 8;
      }
    }
    // Threads with other columns have banks of their own.
    const int at = (word + threads.column / 4) % kWords;
#pragma unroll
    for (int e = 0; e < 8; ++e) columns[threads.column + e][at] = bytes[e];
  }
  __syncthreads();
  auto* numbers =
      params.workspace.value_tiles[head * attend.visibility.num_n_blocks() + n_block].numbers;
  const int word = static_cast<int>(threadIdx.x) % kWords;
  for (int column = static_cast<int>(threadIdx.x) / kWords; column < kHeadDim;
       column += kQuantizeThreads / kWords) {
    *reinterpret_cast<uint32_t*>(numbers + typename Traits::ValueOffsets{}(column, word * 4)) =
        columns[column][(word + column / 8 * 2) % kWords];
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_queries_kernel(const __grid_constant__ QuantizeParams<Traits::kHeadDim> params) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  const AttendParams& attend = params.attend;
  const TileThreads<kHeadDim> threads;
  const int64_t m_block = blockIdx.x, query_head = blockIdx.y, batch = blockIdx.z;
  const int64_t key_head = query_head / group_size(attend.visibility, attend.heads);
  const HeadRows<Element> queries(attend.query, batch, query_head, m_block * kBlockSize,
                                  attend.visibility.seqlen_q, attend.heads.head_dim,
                                  params.aligned_query);
  uint4 eights[threads.kRows];
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) eights[r] = queries.load(threads.row(r), threads.column);
  float mean[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int64_t at =
        (batch * attend.heads.num_heads_k + key_head) * kHeadDim + threads.column + e;
    mean[e] = params.workspace.mean_key[at];
    // Here, as there may be no keys. The heads of a group write the same.
    if (m_block == 0 && threads.first_row == 0) {
      params.workspace.value_scale[at] =
          ldexpf(1, value_exponent(__uint_as_float(params.workspace.largest_values[at])));
    }
  }
  QueryTile<kHeadDim>& tile =
      params.workspace.query_tiles[(batch * gridDim.y + query_head) * gridDim.x + m_block];
#pragma unroll
  for (int r = 0; r < threads.kRows; ++r) {
    const int row = threads.row(r);
    float eight[8];
    float product = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      eight[e] = element<Element>(eights[r], e);
      product = fmaf(eight[e], mean[e], product);
    }
    const float mean_score = row_sum<threads.kChunks>(product) * attend.softmax_scale;
    const float largest = row_largest<threads.kChunks>(eight);
    const bool bad = !isfinite(largest) || !isfinite(mean_score);
    if (bad) {
#pragma unroll
      for (int e = 0; e < 8; ++e) eight[e] = 0;
    }
    *reinterpret_cast<uint2*>(tile.numbers + typename Traits::KeyOffsets{}(row, threads.column)) =
        to_int8(eight, bad ? 0 : int8_inverse(largest));
    if (threads.column == 0) {
      tile.scale[row] = bad ? NAN : largest / kLargestInt8 * (attend.softmax_scale * kLog2E);
      tile.mean_score[row] = bad ? 0 : mean_score;
    }
  }
}

template <typename Traits>
void quantize(const AttendParams& attend, const Workspace<Traits::kHeadDim>& workspace,
              cudaStream_t stream) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  const Visibility& visibility = attend.visibility;
  const QuantizeParams<kHeadDim> params{attend, workspace, aligned_rows(attend.query),
                                        aligned_rows(attend.key), aligned_rows(attend.value)};
  const auto batch = static_cast<unsigned>(visibility.batch);
  const auto key_heads = static_cast<unsigned>(attend.heads.num_heads_k);
  const auto n_blocks = static_cast<unsigned>(visibility.num_n_blocks());
  RRATTN_CUDA_CHECK(cudaMemsetAsync(workspace.largest_values, 0,
                                    sizeof(uint32_t) * batch * key_heads * kHeadDim, stream));
  survey_kernel<Element, kHeadDim>
      <<<dim3(n_blocks + 1, key_heads, batch), kQuantizeThreads, 0, stream>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
  if (n_blocks > 0) {
    quantize_keys_kernel<Traits>
        <<<dim3(n_blocks, key_heads, batch), kQuantizeThreads, 0, stream>>>(params);
    RRATTN_CUDA_CHECK(cudaGetLastError());
  }
  quantize_queries_kernel<Traits><<<dim3(static_cast<unsigned>(visibility.num_m_blocks()),
                                         static_cast<unsigned>(visibility.num_heads), batch),
                                    kQuantizeThreads, 0, stream>>>(params);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda::sm90::quantized_attend
