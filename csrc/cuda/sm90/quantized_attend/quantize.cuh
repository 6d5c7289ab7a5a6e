// From queries, keys and values to the tiles of eight bits in the workspace, as docs/quantization.md
// says. Three kernels, one after the other:
//
//   survey    the mean key of each key head, and the largest magnitude of each column of its values
//   keys      the tiles of keys and of values, a thread block for each pair of them, and the scales of
//             values for the end
//   queries   the tiles of queries
//
// A thread loads eight columns, 16 bytes, at a time. Past the head size and past the end of a sequence
// there are zeros.
#pragma once

#include "config.cuh"
// config.cuh comes first
#include "../../common/heads.cuh"
#include "../../common/rows.cuh"
#include "../../common/softmax.cuh"
#include "e4m3.cuh"

namespace rrattn::cuda::sm90::quantized_attend {

constexpr int kQuantizeThreads = 256;
// Of a query's scores over the keys whose mean is subtracted: as far above that of the mean key is the
// largest of 100,000 or so, were they normal.
constexpr float kExpectedDeviations = 4.5f;

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

// The threads of a block over the rows that are turned, four for each: the first of them has eights 0, 4,
// 8 and so on of columns, the next 1, 5, 9. So few elements change hands.
template <int kHeadDim>
struct RowThreads {
  static constexpr int kEights = kHeadDim / 32;
  static constexpr int kRowStep = kQuantizeThreads / 4;
  static constexpr int kRows = kBlockSize / kRowStep;  // of a thread
  __device__ static int row(int r) { return static_cast<int>(threadIdx.x) / 4 + r * kRowStep; }
  __device__ static int column(int i) { return (static_cast<int>(threadIdx.x) % 4 + i * 4) * 8; }
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

// Eight numbers of the workspace, by two loads.
struct EightFloats {
  float4 first, last;

  __device__ explicit EightFloats(const float* from)
      : first(reinterpret_cast<const float4*>(from)[0]),
        last(reinterpret_cast<const float4*>(from)[1]) {}
  __device__ float operator[](int i) const {
    const float4& four = i < 4 ? first : last;
    return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
  }
};

// The largest magnitude of the row that four threads have; infinite where one of its elements is
// infinite or NaN.
template <int kEights>
__device__ inline float row_largest(const float (&row)[kEights][8]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(row[i][e])));
  }
  return quad_max(isnan(largest) ? INFINITY : largest);
}

template <int kEights>
__device__ inline void clear_row(float (&row)[kEights][8]) {
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) row[i][e] = 0;
  }
}

// Multiplies the row that four threads have by a Hadamard matrix over as many neighbouring elements as
// `together`, over that number, as the oracle does.
template <int kEights>
__device__ inline void rotate(float (&row)[kEights][8], int together) {
  const float inverse = 1.f / static_cast<float>(together);  // a power of two
  const auto butterfly = [](float& a, float& b) {
    const float first = a;
    a = first + b;
    b = first - b;
  };
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) row[i][e] *= inverse;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (!(e & step)) butterfly(row[i][e], row[i][e + step]);
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    if (lanes * 8 >= together) return;
    const float sign = threadIdx.x & lanes ? -1 : 1;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        row[i][e] = fmaf(sign, row[i][e], __shfl_xor_sync(~0u, row[i][e], lanes));
    }
  }
#pragma unroll
  for (int step = 1; step < kEights; step *= 2) {
    if (step * 32 >= together) return;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      if (i & step) continue;
#pragma unroll
      for (int e = 0; e < 8; ++e) butterfly(row[i][e], row[i + step][e]);
    }
  }
}

// The nearest whole numbers to eight times the factor, which are from -127 to 127. Products are rounded
// first; sums with 1.5 * 2^23 then end in the bits of the whole number.
__device__ inline uint2 to_int8(const float (&eight)[8], float factor) {
  uint32_t bits[8];
#pragma unroll
  for (int e = 0; e < 8; ++e)
    bits[e] = __float_as_uint(__fadd_rn(__fmul_rn(eight[e], factor), 0x1.8p23f));
  const auto low_bytes = [&](int e) {
    return __byte_perm(__byte_perm(bits[e], bits[e + 1], 0x40),
                       __byte_perm(bits[e + 2], bits[e + 3], 0x40), 0x5410);
  };
  return make_uint2(low_bytes(0), low_bytes(4));
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

// The mean of the finite keys that a query sees, of the first block that has any, and the variance of
// their columns; zeros where none has. Called by a whole thread block.
template <typename Element, int kHeadDim>
__device__ void find_mean_key(const QuantizeParams<kHeadDim>& params, int64_t batch,
                              int64_t key_head, float* mean, float* variance) {
  constexpr int kParts =
      kQuantizeThreads / kHeadDim;  // threads of a column, each for some of the rows
  __shared__ bool counts[kBlockSize];
  __shared__ double sums[kParts][kHeadDim], squares[kParts][kHeadDim];
  const AttendParams& attend = params.attend;
  const Visibility& visibility = attend.visibility;
  const TileThreads<kHeadDim> threads;
  const int column = static_cast<int>(threadIdx.x) % kHeadDim;
  const int part = static_cast<int>(threadIdx.x) / kHeadDim;
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
    const int count = __syncthreads_count(threadIdx.x < kBlockSize && counts[threadIdx.x]);
    if (count > 0) {
      double sum = 0, square_sum = 0;
#pragma unroll 16
      for (int row = part; row < kBlockSize; row += kParts) {
        const bool is_there = counts[row] && column < keys.head_dim;
        const double x =
            is_there ? static_cast<float>(keys.data[row * keys.row_stride + column]) : 0.f;
        sum += x;
        square_sum += x * x;
      }
      sums[part][column] = sum;
      squares[part][column] = square_sum;
      __syncthreads();
      if (part > 0) return;
#pragma unroll
      for (int other = 1; other < kParts; ++other) {
        sum += sums[other][column];
        square_sum += squares[other][column];
      }
      const double mean_key = sum / count;
      mean[column] = static_cast<float>(mean_key);
      variance[column] = static_cast<float>(fmax(square_sum / count - mean_key * mean_key, 0.));
      return;
    }
  }
  if (part == 0) mean[column] = variance[column] = 0;
}

// The first thread block of a head finds the mean key, the others have a block of values each.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kQuantizeThreads)
    survey_kernel(const __grid_constant__ QuantizeParams<kHeadDim> params) {
  const int64_t key_head = blockIdx.y, batch = blockIdx.z;
  const int64_t head = batch * gridDim.y + key_head;
  if (blockIdx.x == 0) {
    find_mean_key<Element>(params, batch, key_head, params.workspace.mean_key + head * kHeadDim,
                           params.workspace.key_variance + head * kHeadDim);
    // Of no keys; the first block of others overwrites it.
    if (threadIdx.x < kHeadDim) params.workspace.value_scale[head * kHeadDim + threadIdx.x] = 1;
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
  __shared__ uint32_t block_largest;
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
  using Turned = RowThreads<kHeadDim>;
  uint4 eights[Turned::kRows][Turned::kEights];
#pragma unroll
  for (int r = 0; r < Turned::kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i)
      eights[r][i] = keys.load(Turned::row(r), Turned::column(i));
  }
  if (threadIdx.x == 0) block_largest = 0;
  mark_seen(attend, batch, key_head, first_key, seen);

  const float* mean_key = params.workspace.mean_key + head * kHeadDim;
  KeyTile<kHeadDim>& key_tile =
      params.workspace.key_tiles[head * attend.visibility.num_n_blocks() + n_block];
  const auto together = static_cast<int>(rotated_together(attend.heads.head_dim));
  float rotated[Turned::kRows][Turned::kEights][8];
  float largest = 0;  // of the block
#pragma unroll
  for (int r = 0; r < Turned::kRows; ++r) {
    const int row = Turned::row(r);
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i) {
      const EightFloats mean(mean_key + Turned::column(i));
#pragma unroll
      for (int e = 0; e < 8; ++e)
        rotated[r][i][e] = seen[row] ? element<Element>(eights[r][i], e) - mean[e] : 0;
    }
    const bool bad = !isfinite(row_largest(rotated[r]));
    if (bad) clear_row(rotated[r]);
    if (threadIdx.x % 4 == 0) bad_key[row] = bad;
    rotate(rotated[r], together);
    largest = fmaxf(largest, row_largest(rotated[r]));
  }
  const uint32_t warp_largest = __reduce_max_sync(~0u, __float_as_uint(largest));
  if (threadIdx.x % 32 == 0) atomicMax(&block_largest, warp_largest);
  __syncthreads();
  const Int8Scale key_scale(__uint_as_float(block_largest), 1);
  if (threadIdx.x == 0) key_tile.scale = key_scale.scale;
#pragma unroll
  for (int r = 0; r < Turned::kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i) {
      *reinterpret_cast<uint2*>(key_tile.numbers +
                                typename Traits::KeyOffsets{}(Turned::row(r), Turned::column(i))) =
          to_int8(rotated[r][i], key_scale.inverse);
    }
  }

  // A thread has the four keys of neighbouring positions, which are a word of each of its columns.
  float scale[8];  // the inverse: also a power of two
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int64_t at = head * kHeadDim + threads.column + e;
    const int exponent = value_exponent(__uint_as_float(params.workspace.largest_values[at]));
    scale[e] = ldexpf(1, -exponent);
    if (n_block == 0 && threads.first_row == 0)
      params.workspace.value_scale[at] = ldexpf(1, exponent);
  }
#pragma unroll
  for (int i = 0; i < threads.kRows / 4; ++i) {
    const int word = threads.row(i);
    float number[4][8];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int row = key_of_position(word * 4 + p);
      const uint4 eight = values.load(row, threads.column);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float x = element<Element>(eight, e) * scale[e];
        // NaN where x is not finite.
        number[p][e] = bad_key[row] ? NAN : seen[row] ? x + (x - x) : 0;
      }
    }
    // Threads with other columns have banks of their own.
    const int at = (word + threads.column / 4) % kWords;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      columns[threads.column + e][at] =
          join(to_e4m3(number[0][e], number[1][e]), to_e4m3(number[2][e], number[3][e]));
    }
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
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    quantize_queries_kernel(const __grid_constant__ QuantizeParams<Traits::kHeadDim> params) {
  using Element = typename Traits::Element;
  constexpr int kHeadDim = Traits::kHeadDim;
  const AttendParams& attend = params.attend;
  using Turned = RowThreads<kHeadDim>;
  const int64_t m_block = blockIdx.x, query_head = blockIdx.y, batch = blockIdx.z;
  const int64_t key_head = query_head / group_size(attend.visibility, attend.heads);
  const HeadRows<Element> queries(attend.query, batch, query_head, m_block * kBlockSize,
                                  attend.visibility.seqlen_q, attend.heads.head_dim,
                                  params.aligned_query);
  uint4 eights[Turned::kRows][Turned::kEights];
#pragma unroll
  for (int r = 0; r < Turned::kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i)
      eights[r][i] = queries.load(Turned::row(r), Turned::column(i));
  }
  const int64_t of_head = (batch * attend.heads.num_heads_k + key_head) * kHeadDim;
  float product[Turned::kRows] = {}, square[Turned::kRows] = {};
#pragma unroll
  for (int i = 0; i < Turned::kEights; ++i) {
    const EightFloats mean(params.workspace.mean_key + of_head + Turned::column(i));
    const EightFloats variance(params.workspace.key_variance + of_head + Turned::column(i));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int r = 0; r < Turned::kRows; ++r) {
        const float x = element<Element>(eights[r][i], e);
        product[r] = fmaf(x, mean[e], product[r]);
        square[r] = fmaf(x * x, variance[e], square[r]);
      }
    }
  }
  const auto together = static_cast<int>(rotated_together(attend.heads.head_dim));
  const float factor = attend.softmax_scale * kLog2E * static_cast<float>(together);
  QueryTile<kHeadDim>& tile =
      params.workspace.query_tiles[(batch * gridDim.y + query_head) * gridDim.x + m_block];
#pragma unroll
  for (int r = 0; r < Turned::kRows; ++r) {
    const int row = Turned::row(r);
    float elements[Turned::kEights][8];
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) elements[i][e] = element<Element>(eights[r][i], e);
    }
    const float mean_score = quad_sum(product[r]) * attend.softmax_scale;
    const float deviation = sqrtf(quad_sum(square[r])) * fabsf(attend.softmax_scale) * kLog2E;
    const bool bad = !isfinite(row_largest(elements)) || !isfinite(mean_score);
    if (bad) clear_row(elements);
    rotate(elements, together);
    const Int8Scale scale(row_largest(elements), factor);
#pragma unroll
    for (int i = 0; i < Turned::kEights; ++i) {
      *reinterpret_cast<uint2*>(tile.numbers +
                                typename Traits::KeyOffsets{}(row, Turned::column(i))) =
          to_int8(elements[i], scale.inverse);
    }
    if (threadIdx.x % 4 == 0) {
      tile.scale[row] = bad ? NAN : scale.scale;
      tile.mean_score[row] = bad ? 0 : mean_score;
      tile.base[row] = ceilf(kExpectedDeviations * deviation);
    }
  }
}

// Makes the tiles.
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
