#include "../stage.cuh"

template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 96, 96, true>;
template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 96, 96, false>;
