// The gradients of block-sparse attention of one element type; backward_<type>.cu instantiate it.
#pragma once

#include "../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType>
struct BackwardStage {
  static int64_t workspace_bytes(const BackwardParams& params);
  static void run(const BackwardParams& params);
};

}  // namespace rrattn::cuda
