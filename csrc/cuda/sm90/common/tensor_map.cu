#include <cudaTypedefs.h>

#include <algorithm>

#include "../../common/launch.cuh"
#include "tensor_map.h"

namespace rrattn::cuda::sm90 {

namespace {

// The driver's function, found through the runtime: nothing here links against the driver.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  RRATTN_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                     cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the GPU driver has no cuTensorMapEncodeTiled: it must be of CUDA 12");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

bool can_map(const Rows& rows, const TensorShape& shape) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0);
  };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(shape.seqlen, rows.row_stride) &&
         fits(shape.num_heads, rows.head_stride) && fits(shape.batch, rows.batch_stride);
}

int64_t num_elements(const TensorShape& shape) {
  return shape.batch * shape.seqlen * shape.num_heads * shape.head_dim;
}

// A thread copies 8 elements.
__global__ void pack_rows_kernel(Rows from, TensorShape shape, uint16_t* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t chunks = shape.head_dim / 8;
  if (i >= shape.batch * shape.seqlen * shape.num_heads * chunks) return;
  const int64_t head = i / chunks % shape.num_heads, row = i / chunks / shape.num_heads;
  const auto* chunk =
      static_cast<const uint16_t*>(from.data) + row / shape.seqlen * from.batch_stride +
      row % shape.seqlen * from.row_stride + head * from.head_stride + i % chunks * 8;
  for (int e = 0; e < 8; ++e) to[i * 8 + e] = chunk[e];
}

Rows pack_rows(const Rows& rows, const TensorShape& shape, void* packed, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t blocks = ceil_div(num_elements(shape) / 8, kThreads);
  pack_rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      rows, shape, static_cast<uint16_t*>(packed));
  RRATTN_CUDA_CHECK(cudaGetLastError());
  const int64_t row_stride = shape.num_heads * shape.head_dim;
  return {packed, shape.seqlen * row_stride, row_stride, shape.head_dim};
}

}  // namespace

int64_t elements_to_pack(const Rows& rows, const TensorShape& shape) {
  return can_map(rows, shape) ? 0 : num_elements(shape);
}

CUtensorMap map_rows(const Rows& rows, const TensorShape& shape, void* packed, int box_rows,
                     cudaStream_t stream, int panel) {
  if (num_elements(shape) == 0) return {};  // never read from
  static const auto encode = find_encoder();
  const Rows mapped = can_map(rows, shape) ? rows : pack_rows(rows, shape, packed, stream);
  const auto type = shape.dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // The stride of a dimension of size 1 counts for nothing, but must be valid.
  const auto bytes = [](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(size <= 1 ? 16 : stride * 2);
  };
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.seqlen),
      static_cast<cuuint64_t>(shape.num_heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t strides[] = {bytes(shape.seqlen, mapped.row_stride),
                                bytes(shape.num_heads, mapped.head_stride),
                                bytes(shape.batch, mapped.batch_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box_rows), 1,
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, 4, mapped.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             panel == kPanel ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  return map;
}

}  // namespace rrattn::cuda::sm90
