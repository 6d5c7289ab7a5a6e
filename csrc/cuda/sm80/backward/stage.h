// The gradients of block-sparse attention for one element type, padded head sizes, that of queries and
// keys and that of values, mode and kind of GPU, instantiated in
// instantiations/backward_<type>_<head sizes>.cu.
#pragma once

#include "../../../core/params.h"
#include "../common/tile_table.h"

namespace rrattn::cuda::sm80::backward {

template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic, TileTable kTable>
struct Stage {
  static int64_t workspace_bytes(const BackwardParams& params);
  static void launch(const BackwardParams& params);
};

}  // namespace rrattn::cuda::sm80::backward
