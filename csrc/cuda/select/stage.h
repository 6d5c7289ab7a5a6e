// The selection by thread blocks of kWarps warps, for rows of at most kWarps * kWords words of the
// mask, instantiated in select.cu.
#pragma once

#include "../../core/params.h"
#include "../ragged_stage.h"

namespace rrattn::cuda::select {

template <int kWarps, int kWords>
struct Stage {
  static int64_t workspace_bytes(const SelectParams& params);
  static void launch(const SelectParams& params);

  static int64_t ragged_workspace_bytes(const RaggedParams& batch, const RaggedPlan& plan);
  static void launch_ragged(const RaggedParams& batch, const RaggedPlan& plan, void* workspace);
};

}  // namespace rrattn::cuda::select
