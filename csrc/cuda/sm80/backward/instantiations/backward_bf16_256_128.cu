#include "../stage.cuh"

RRATTN_INSTANTIATE_BACKWARD(rrattn::DataType::kBFloat16, 256, 128);
