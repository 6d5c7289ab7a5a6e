#include "../stage.cuh"

RRATTN_INSTANTIATE_ATTEND(rrattn::DataType::kBFloat16, 64, 64);
