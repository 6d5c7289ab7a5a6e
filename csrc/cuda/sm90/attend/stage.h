// Block-sparse attention for one element type and padded head sizes, that of queries and keys and
// that of values, instantiated in instantiations/attend_<type>_<head sizes>.cu.
#pragma once

#include "../../../core/params.h"
#include "../../ragged_stage.h"

namespace rrattn::cuda::sm90::attend {

template <DataType kDataType, int kHeadDim, int kHeadDimV>
struct Stage {
  static int64_t workspace_bytes(const AttendParams& params);
  static void launch(const AttendParams& params);

  static int64_t ragged_workspace_bytes(const RaggedParams& batch, const RaggedPlan& plan);
  static void launch_ragged(const RaggedParams& batch, const RaggedPlan& plan, void* workspace);
};

}  // namespace rrattn::cuda::sm90::attend
