// The estimate for one element type and padded head size, instantiated in
// estimate_<type>_<head size>.cu.
#pragma once

#include "../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType, int kHeadDim>
struct EstimateStage {
  static int64_t workspace_bytes(const EstimateParams& params);
  static void run(const EstimateParams& params);
};

}  // namespace rrattn::cuda
