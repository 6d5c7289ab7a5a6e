#include "../core/dense_mask.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "parallel.h"

namespace rrattn::cpu {

namespace {

constexpr int64_t kKeysPerItem = 512;

void raise_to(std::atomic<int32_t>& largest, int32_t value) {
  int32_t seen = largest.load();
  while (seen < value && !largest.compare_exchange_weak(seen, value)) {
  }
}

// Reads up to kKeysPerItem keys of a head, from first_key on, down all rows.
template <typename Mask>
void read_keys(const DenseMaskParams& params, int64_t head, int64_t first_key,
               std::atomic<int32_t>& all_faults, std::atomic<int32_t>& fault_value) {
  const int64_t num_keys = std::min(kKeysPerItem, params.seqlen_k - first_key);
  const auto* mask = static_cast<const typename Mask::Storage*>(params.mask) +
                     head / params.num_heads * params.batch_stride +
                     head % params.num_heads * params.head_stride + first_key * params.key_stride;
  const int64_t first_own_row = first_key - (params.seqlen_k - params.seqlen_q);
  int32_t seen_before[kKeysPerItem];  // by the row before; before row 0: cached keys
  int32_t count[kKeysPerItem] = {};   // of rows that see the key
  for (int64_t i = 0; i < num_keys; ++i) seen_before[i] = first_own_row + i < 0;
  for (int64_t row = 0; row < params.seqlen_q; ++row) {
    const auto* at = mask + row * params.row_stride;
    const int64_t own = row - first_own_row;  // this row may be the key's first
    if (0 <= own && own < num_keys) seen_before[own] = 1;
    int32_t neither = 0, gained = 0;
    const auto read_row = [&](int64_t key_stride) {
      for (int64_t i = 0; i < num_keys; ++i) {
        const int32_t seen = Mask::shows(at[i * key_stride]);
        neither |= !seen & !Mask::hides(at[i * key_stride]);
        gained |= seen & ~seen_before[i];
        seen_before[i] = seen;
        count[i] += seen;
      }
    };
    params.key_stride == 1 ? read_row(1) : read_row(params.key_stride);
    if (gained) all_faults |= kNotCausal;
    for (int64_t i = 0; i < num_keys && neither; ++i) {
      const auto value = at[i * params.key_stride];
      if (Mask::shows(value) || Mask::hides(value)) continue;
      all_faults |= kNeitherSeenNorHidden;
      raise_to(fault_value, bits_of(value));
    }
  }
  for (int64_t i = 0; i < num_keys; ++i) {
    params.start_rows[head * params.seqlen_k + first_key + i] =
        start_row(first_own_row + i, count[i]);
  }
}

}  // namespace

int64_t dense_mask_workspace_bytes(const DenseMaskParams&) { return 0; }

void run_dense_mask(const DenseMaskParams& params) {
  std::atomic<int32_t> faults{0}, value{kNoValue};
  const int64_t items_per_head = ceil_div(params.seqlen_k, kKeysPerItem);
  const auto read_items = [&](int, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      with_mask_type(params.type, [&](auto mask) {
        read_keys<decltype(mask)>(params, item / items_per_head,
                                  item % items_per_head * kKeysPerItem, faults, value);
      });
    }
  };
  parallel_for(params.execution.num_threads, params.batch * params.num_heads * items_per_head,
               grain_for(params.seqlen_q * kKeysPerItem), read_items);
  params.verdict[0] = faults;
  params.verdict[1] = value;
}

}  // namespace rrattn::cpu
