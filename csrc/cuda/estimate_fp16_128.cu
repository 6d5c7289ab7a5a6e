#include "estimate_stage.cuh"

template struct rrattn::cuda::EstimateStage<rrattn::DataType::kFloat16, 128>;
