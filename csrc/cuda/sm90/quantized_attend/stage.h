// Block-sparse attention in eight bits for one element type and padded head size, that of queries,
// keys and values, instantiated in instantiations/quantized_attend_<type>_<head size>.cu.
#pragma once

#include "../../../core/params.h"

namespace rrattn::cuda::sm90::quantized_attend {

template <DataType kDataType, int kHeadDim>
struct Stage {
  static int64_t workspace_bytes(const AttendParams& params);
  static void launch(const AttendParams& params);
};

}  // namespace rrattn::cuda::sm90::quantized_attend
