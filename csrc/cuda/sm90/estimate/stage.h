// The estimate for one element type, padded head size and stride of keys, instantiated in
// instantiations/estimate_<type>_<head size>.cu.
#pragma once

#include "../../../core/params.h"

namespace rrattn::cuda::sm90::estimate {

template <DataType kDataType, int kHeadDim, int kKeyStride>
struct Stage {
  static int64_t workspace_bytes(const EstimateParams& params);
  static void launch(const EstimateParams& params);
};

}  // namespace rrattn::cuda::sm90::estimate
