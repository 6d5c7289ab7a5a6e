#include "../stage.cuh"

RRATTN_INSTANTIATE_ATTEND(rrattn::DataType::kBFloat16, 128, 128);
