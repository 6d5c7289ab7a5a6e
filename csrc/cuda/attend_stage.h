// Block-sparse attention for one element type and padded head size, instantiated in
// attend_<type>_<head size>.cu.
#pragma once

#include "../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType, int kHeadDim>
struct AttendStage {
  static int64_t workspace_bytes(const AttendParams& params);
  static void run(const AttendParams& params);
};

}  // namespace rrattn::cuda
