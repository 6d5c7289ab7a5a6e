// Defines EstimateStage, for all sample strides.
#pragma once

#include <type_traits>

#include "estimate_sm90.cuh"
#include "estimate_stage.h"

namespace rrattn::cuda {

template <DataType kDataType, int kHeadDim>
using EstimateTraitsFor = EstimateTraits<
    std::conditional_t<kDataType == DataType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>,
    kHeadDim>;

template <DataType kDataType, int kHeadDim>
int64_t EstimateStage<kDataType, kHeadDim>::workspace_bytes(const EstimateParams& params) {
  Arena arena;
  EstimateWorkspace<EstimateTraitsFor<kDataType, kHeadDim>>(arena, params, num_multiprocessors());
  return arena.used();
}

template <DataType kDataType, int kHeadDim>
void EstimateStage<kDataType, kHeadDim>::run(const EstimateParams& params) {
  using Traits = EstimateTraitsFor<kDataType, kHeadDim>;
  switch (params.sampling.stride) {
    case 2:
      return launch_estimate<Traits, 2>(params);
    case 4:
      return launch_estimate<Traits, 4>(params);
    case 8:
      return launch_estimate<Traits, 8>(params);
    case 16:
      return launch_estimate<Traits, 16>(params);
    case 32:
      return launch_estimate<Traits, 32>(params);
    case 64:
      return launch_estimate<Traits, 64>(params);
  }
}

}  // namespace rrattn::cuda
