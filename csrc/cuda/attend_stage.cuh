// Defines AttendStage.
#pragma once

#include <type_traits>

#include "attend_sm90.cuh"
#include "attend_stage.h"

namespace rrattn::cuda {

template <DataType kDataType, int kHeadDim>
int64_t AttendStage<kDataType, kHeadDim>::workspace_bytes(const AttendParams& params) {
  Arena arena;
  AttendWorkspace(arena, params);
  return arena.used();
}

template <DataType kDataType, int kHeadDim>
void AttendStage<kDataType, kHeadDim>::run(const AttendParams& params) {
  using Element =
      std::conditional_t<kDataType == DataType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  launch_attend<AttendTraits<Element, kHeadDim>>(params);
}

}  // namespace rrattn::cuda
