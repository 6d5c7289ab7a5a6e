#include "backward_stage.cuh"

template struct rrattn::cuda::BackwardStage<rrattn::DataType::kBFloat16>;
