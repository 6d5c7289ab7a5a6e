// The gradients of block-sparse attention for one element type, the same bits on every run or not,
// instantiated in instantiations/backward_<type>.cu.
#pragma once

#include "../../../core/params.h"

namespace rrattn::cuda::sm90::backward {

template <DataType kDataType, bool kDeterministic>
struct Stage {
  static int64_t workspace_bytes(const BackwardParams& params);
  static void launch(const BackwardParams& params);
};

}  // namespace rrattn::cuda::sm90::backward
