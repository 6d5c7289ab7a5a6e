// The estimate for one element type, padded head size, stride of keys and kind of GPU, instantiated
// in instantiations/estimate_<type>_<head size>.cu.
#pragma once

#include "../../../core/params.h"
#include "../../ragged_stage.h"
#include "../common/tile_table.h"

namespace rrattn::cuda::sm80::estimate {

template <DataType kDataType, int kHeadDim, int kKeyStride, TileTable kTable>
struct Stage {
  static int64_t workspace_bytes(const EstimateParams& params);
  static void launch(const EstimateParams& params);

  static EstimateTiles ragged_tiles();
  static int64_t ragged_workspace_bytes(const RaggedParams& batch, const RaggedPlan& plan);
  static void launch_ragged(const RaggedParams& batch, const RaggedPlan& plan, void* workspace);
};

}  // namespace rrattn::cuda::sm80::estimate
