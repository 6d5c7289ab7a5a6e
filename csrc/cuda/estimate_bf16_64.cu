#include "estimate_stage.cuh"

template struct rrattn::cuda::EstimateStage<rrattn::DataType::kBFloat16, 64>;
