// The sections in which attention takes its rows.
#pragma once

#include "../../core/ragged.h"
#include "heads.cuh"
#include "work_order.cuh"

namespace rrattn::cuda {

// Query heads of a section whose keys and values have at most `section_bytes`.
inline int attend_section_heads(const AttendParams& attend, int64_t section_bytes) {
  const Visibility& visibility = attend.visibility;
  const int64_t head_bytes = visibility.seqlen_k *
                             (attend.heads.head_dim + attend.heads.head_dim_v) *
                             size_of(attend.heads.dtype);
  const int64_t key_heads = visibility.batch * attend.heads.num_heads_k;
  return heads_in_section(section_bytes, head_bytes, key_heads) *
         static_cast<int>(group_size(visibility, attend.heads));
}

// A row of the block mask: 128 queries of a head.
struct MaskRow {
  int index;  // in [B, Hq, Mq]
  int m_block, head;
  int batch;
};

// The row at a place of the order by sections, of num_rows in all: query blocks go from the last, under
// the diagonal the longest, to the first.
__device__ inline MaskRow row_of_place(int place, const Visibility& visibility, int num_rows,
                                       int section_heads) {
  const int num_m_blocks = static_cast<int>(visibility.num_m_blocks());
  const int num_heads = static_cast<int>(visibility.num_heads);
  const WorkPlace at = place_of_item(place, num_rows / num_m_blocks, num_m_blocks, section_heads);
  const int m_block = num_m_blocks - 1 - at.block;
  return {at.head * num_m_blocks + m_block, m_block, at.head % num_heads, at.head / num_heads};
}

// The row of an item of work: its place is that in `places`, the order of RowOrder, if there is one.
__device__ inline MaskRow row_of_item(int item, const int* places, const Visibility& visibility,
                                      int num_rows, int section_heads) {
  return row_of_place(places == nullptr ? item : places[item], visibility, num_rows, section_heads);
}

// A request of a ragged batch that has as many keys as any may have, for its sections.
inline AttendParams longest_call(const RaggedParams& batch) {
  AttendParams longest = batch.attend;
  longest.visibility.seqlen_k = batch.max_seqlen_k;
  return longest;
}

}  // namespace rrattn::cuda
