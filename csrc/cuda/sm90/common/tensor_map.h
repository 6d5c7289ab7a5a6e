// Tensor maps: what the bulk tensor copies (TMA) need to know of a [B, L, H, D] tensor in memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "../../../core/params.h"

namespace rrattn::cuda::sm90 {

constexpr int kPanel = 64;        // columns of a copied box: 128 bytes, the widest swizzle
constexpr int kNarrowPanel = 32;  // for head sizes that are no multiple of that

struct TensorShape {
  int64_t batch, seqlen, num_heads, head_dim;
  DataType dtype;  // of 2 bytes
};

inline TensorShape query_shape_of(const Visibility& visibility, const Heads& heads) {
  return {visibility.batch, visibility.seqlen_q, visibility.num_heads, heads.head_dim, heads.dtype};
}
inline TensorShape key_shape_of(const Visibility& visibility, const Heads& heads) {
  return {visibility.batch, visibility.seqlen_k, heads.num_heads_k, heads.head_dim, heads.dtype};
}
inline TensorShape value_shape_of(const Visibility& visibility, const Heads& heads) {
  return {visibility.batch, visibility.seqlen_k, heads.num_heads_k, heads.head_dim_v, heads.dtype};
}
inline TensorShape out_shape_of(const Visibility& visibility, const Heads& heads) {
  return {visibility.batch, visibility.seqlen_q, visibility.num_heads, heads.head_dim_v,
          heads.dtype};
}

// 0 where the bulk copies can read the rows in place. Otherwise, for rows that do not start on 16
// bytes or are broadcast, the size of a packed copy that they can read.
int64_t elements_to_pack(const Rows& rows, const TensorShape& shape);

// A map of boxes of `box_rows` rows by `panel` columns of one head, swizzled as wgmma reads them.
// What lies outside the tensor reads as zero. Coordinates are column, row, head, batch. `packed`
// has room for elements_to_pack elements, and is filled on the stream.
CUtensorMap map_rows(const Rows& rows, const TensorShape& shape, void* packed, int box_rows,
                     cudaStream_t stream, int panel = kPanel);

}  // namespace rrattn::cuda::sm90
