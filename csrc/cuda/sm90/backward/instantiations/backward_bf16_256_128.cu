#include "../stage.cuh"

template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 256, 128, true>;
template struct rrattn::cuda::sm90::backward::Stage<rrattn::DataType::kBFloat16, 256, 128, false>;
