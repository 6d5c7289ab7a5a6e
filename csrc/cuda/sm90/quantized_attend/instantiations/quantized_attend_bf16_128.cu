#include "../stage.cuh"

template struct rrattn::cuda::sm90::quantized_attend::Stage<rrattn::DataType::kBFloat16, 128>;
