// The gradients of block-sparse attention for one element type, instantiated in backward_<type>.cu.
#pragma once

#include "../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType>
struct BackwardStage {
  static int64_t workspace_bytes(const BackwardParams& params);
  static void run(const BackwardParams& params);
};

}  // namespace rrattn::cuda
