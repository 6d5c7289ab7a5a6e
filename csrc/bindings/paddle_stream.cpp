// Tensor::stream is declared under PADDLE_WITH_CUDA alone. There most of Paddle's headers ask for
// those of cuDNN and cuBLAS, which nothing here needs; this one asks for the CUDA runtime's. Hence
// a file of its own.
#define PADDLE_WITH_CUDA
#include "paddle/phi/api/include/tensor.h"

namespace rrattn {

void* stream_of(const paddle::Tensor& tensor) { return tensor.stream(); }

}  // namespace rrattn
