#include "../stage.cuh"

template struct rrattn::cuda::sm90::attend::Stage<rrattn::DataType::kBFloat16, 96, 96>;
