#include "../stage.cuh"

RRATTN_INSTANTIATE_BACKWARD(rrattn::DataType::kFloat16, 64, 64);
