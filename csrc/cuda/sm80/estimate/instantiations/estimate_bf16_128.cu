#include "../stage.cuh"

RRATTN_INSTANTIATE_ESTIMATE(rrattn::DataType::kBFloat16, 128);
