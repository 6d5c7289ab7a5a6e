// Paddle declares Tensor::stream only under PADDLE_WITH_CUDA. With that macro most of its headers
// include those of cuDNN and cuBLAS, which nothing here needs; this one includes the CUDA runtime's
// alone. Hence a file of its own.
#define PADDLE_WITH_CUDA
#include <cuda_runtime.h>

#include <stdexcept>

#include "paddle/phi/api/include/tensor.h"

namespace rrattn {

void* stream_of(const paddle::Tensor& tensor) { return tensor.stream(); }

// In the order of the tensor's stream.
void fill_with_zeros(paddle::Tensor& tensor, int64_t bytes) {
  if (cudaMemsetAsync(tensor.data(), 0, static_cast<size_t>(bytes), tensor.stream()) !=
      cudaSuccess) {
    throw std::runtime_error("cudaMemsetAsync failed");
  }
}

}  // namespace rrattn
