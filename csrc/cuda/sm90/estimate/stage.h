// The estimate for one element type, padded head size and stride of keys, instantiated in
// instantiations/estimate_<type>_<head size>.cu.
#pragma once

#include "../../../core/params.h"
#include "../../ragged_stage.h"

namespace rrattn::cuda::sm90::estimate {

template <DataType kDataType, int kHeadDim, int kKeyStride>
struct Stage {
  static int64_t workspace_bytes(const EstimateParams& params);
  static void launch(const EstimateParams& params);

  static EstimateTiles ragged_tiles();
  static int64_t ragged_workspace_bytes(const RaggedParams& batch, const RaggedPlan& plan);
  static void launch_ragged(const RaggedParams& batch, const RaggedPlan& plan, void* workspace);
};

}  // namespace rrattn::cuda::sm90::estimate
