#include "../stage.cuh"

template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 64, 64, true>;
template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 64, 64, false>;
