// Defines BackwardStage.
#pragma once

#include <type_traits>

#include "backward_sm90.cuh"
#include "backward_stage.h"

namespace rrattn::cuda {

template <DataType kDataType>
int64_t BackwardStage<kDataType>::workspace_bytes(const BackwardParams& params) {
  Arena arena;
  BackwardWorkspace(arena, params);
  return arena.used();
}

template <DataType kDataType>
void BackwardStage<kDataType>::run(const BackwardParams& params) {
  using Element =
      std::conditional_t<kDataType == DataType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  if (params.deterministic) {
    launch_backward<BackwardTraits<Element, true>>(params);
  } else {
    launch_backward<BackwardTraits<Element, false>>(params);
  }
}

}  // namespace rrattn::cuda
