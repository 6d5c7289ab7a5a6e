// The type in which kernels hold the elements of a tensor.
#pragma once

#include <cutlass/numeric_types.h>

#include <type_traits>

#include "../../core/params.h"

namespace rrattn::cuda {

template <DataType kDataType>
using ElementOf =
    std::conditional_t<kDataType == DataType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;

}  // namespace rrattn::cuda
