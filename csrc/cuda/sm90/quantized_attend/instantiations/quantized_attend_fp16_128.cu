#include "../stage.cuh"

template struct rrattn::cuda::sm90::quantized_attend::Stage<rrattn::DataType::kFloat16, 128>;
