// Paddle declares Tensor::stream only under PADDLE_WITH_CUDA. With that macro most of its headers
// include those of cuDNN and cuBLAS, which nothing here needs; this one includes the CUDA runtime's
// alone. Hence a file of its own.
#define PADDLE_WITH_CUDA
#include "paddle/phi/api/include/tensor.h"

namespace rrattn {

void* stream_of(const paddle::Tensor& tensor) { return tensor.stream(); }

}  // namespace rrattn
