// The mean key and the mean value of each key block, for attention that is compensated.
#pragma once

#include <cuda_runtime.h>

#include "../../core/params.h"

namespace rrattn::cuda {

//   key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv]
//     ->  mean_key [B, Mk, Hkv, D], mean_value [B, Mk, Hkv, Dv]
//
// Tiles of means have also those that stand in for nothing, where their probability is 0. So a mean
// value with a NaN or infinity is zero, and its mean key NaN instead: it shows in all that it stands
// in for, and nowhere else.
//
// kColumns: 64, 128 or 256, and at least both head sizes. The kernels are compiled once for each GPU
// (block_means.cu), for bfloat16 and float16.
template <typename Element, int kColumns>
void launch_block_means(const AttendParams& params, const Rows& mean_key, const Rows& mean_value,
                        cudaStream_t stream);

}  // namespace rrattn::cuda
