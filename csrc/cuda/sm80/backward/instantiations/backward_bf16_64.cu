#include "../stage.cuh"

RRATTN_INSTANTIATE_BACKWARD(rrattn::DataType::kBFloat16, 64, 64);
