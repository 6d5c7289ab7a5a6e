// The gradients of block-sparse attention for one element type and padded head sizes, that of queries
// and keys and that of values, the same bits on every run or not, instantiated in
// instantiations/backward_<type>_<head sizes>.cu.
#pragma once

#include "../../../core/params.h"

namespace rrattn::cuda::sm90::backward {

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
struct Stage {
  static int64_t workspace_bytes(const BackwardParams& params);
  static void launch(const BackwardParams& params);
};

}  // namespace rrattn::cuda::sm90::backward
