#include "attend_stage.cuh"

template struct rrattn::cuda::AttendStage<rrattn::DataType::kFloat16, 64>;
