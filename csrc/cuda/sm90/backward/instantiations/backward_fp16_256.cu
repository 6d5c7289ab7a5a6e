#include "../stage.cuh"

template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kFloat16, 256, 256, true>;
template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kFloat16, 256, 256, false>;
