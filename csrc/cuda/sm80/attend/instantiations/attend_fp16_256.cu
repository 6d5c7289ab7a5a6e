#include "../stage.cuh"

RRATTN_INSTANTIATE_ATTEND(rrattn::DataType::kFloat16, 256, 256);
