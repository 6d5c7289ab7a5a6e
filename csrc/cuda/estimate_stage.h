// The estimate of one element type and padded head size; estimate_<type>_<head size>.cu instantiate
// it.
#pragma once

#include "../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType, int kHeadDim>
struct EstimateStage {
  static int64_t workspace_bytes(const EstimateParams& params);
  static void run(const EstimateParams& params);
};

}  // namespace rrattn::cuda
