#include "attend_stage.cuh"

template struct rrattn::cuda::AttendStage<rrattn::DataType::kBFloat16, 64>;
