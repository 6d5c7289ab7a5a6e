// Query heads and key heads.
#pragma once

#include "../../core/params.h"

namespace rrattn::cuda {

// Query heads of a key head: a group. They lie side by side.
__host__ __device__ inline int64_t group_size(const Visibility& visibility, const Heads& heads) {
  return visibility.num_heads / heads.num_heads_k;
}

}  // namespace rrattn::cuda
