// FlashMask bounds of dense masks, in dense_mask.cu.
#pragma once

#include "../../core/params.h"

namespace rrattn::cuda {

struct DenseMaskStage {
  static int64_t workspace_bytes(const DenseMaskParams& params);
  static void launch(const DenseMaskParams& params);
};

}  // namespace rrattn::cuda
