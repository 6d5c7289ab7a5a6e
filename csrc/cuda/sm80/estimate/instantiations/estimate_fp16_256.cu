#include "../stage.cuh"

RRATTN_INSTANTIATE_ESTIMATE(rrattn::DataType::kFloat16, 256);
