#include "../core/dense_mask.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace rrattn::cpu {

namespace {

// Rows that a thread takes at a time: whole ones, which memory brings fastest, and few enough to
// count in bytes.
constexpr int64_t kRowsPerItem = 255;

struct RowFaults {
  uint8_t neither;  // a value neither shows nor hides
  uint8_t gained;   // a key is seen that the row before did not see
};

// One row. Its pointers are told apart, or the compiler makes no vectors of it.
template <typename Mask, typename Stride>
RowFaults read_row(const typename Mask::Storage* at, Stride key_stride, int64_t num_keys,
                   uint8_t* __restrict seen_before, uint8_t* __restrict count) {
  uint8_t neither = 0, gained = 0;
  for (int64_t i = 0; i < num_keys; ++i) {
    const uint8_t seen = Mask::shows(at[i * key_stride]);
    neither |= !seen & !Mask::hides(at[i * key_stride]);
    gained |= seen & ~seen_before[i];
    seen_before[i] = seen;
    count[i] += seen;
  }
  return {neither, gained};
}

void raise_to(std::atomic<int32_t>& largest, int32_t value) {
  int32_t seen = largest.load();
  while (seen < value && !largest.compare_exchange_weak(seen, value)) {
  }
}

// Adds how many of a head's rows from first_row on, kRowsPerItem at most, see each key. `scratch`
// has two bytes for each key.
template <typename Mask>
void count_rows(const DenseMaskParams& params, int64_t head, int64_t first_row, uint8_t* scratch,
                std::atomic<int32_t>& faults, std::atomic<int32_t>& fault_value) {
  const int64_t num_keys = params.seqlen_k, shift = params.seqlen_k - params.seqlen_q;
  const auto* mask = static_cast<const typename Mask::Storage*>(params.mask) +
                     head / params.num_heads * params.batch_stride +
                     head % params.num_heads * params.head_stride;
  uint8_t *seen_before = scratch, *count = scratch + num_keys;
  std::memset(count, 0, num_keys);
  for (int64_t i = 0; i < num_keys; ++i) {
    seen_before[i] =
        first_row == 0
            ? i < shift
            : Mask::shows(mask[(first_row - 1) * params.row_stride + i * params.key_stride]);
  }
  const int64_t end_row = std::min(first_row + kRowsPerItem, params.seqlen_q);
  for (int64_t row = first_row; row < end_row; ++row) {
    const auto* at = mask + row * params.row_stride;
    seen_before[row + shift] = 1;  // the row's own key may be seen for the first time
    const auto [neither, gained] =
        params.key_stride == 1
            ? read_row<Mask>(at, std::integral_constant<int64_t, 1>(), num_keys, seen_before, count)
            : read_row<Mask>(at, params.key_stride, num_keys, seen_before, count);
    if (gained) faults |= kNotCausal;
    for (int64_t i = 0; i < num_keys && neither; ++i) {
      const auto value = at[i * params.key_stride];
      if (Mask::shows(value) || Mask::hides(value)) continue;
      faults |= kNeitherSeenNorHidden;
      raise_to(fault_value, bits_of(value));
    }
  }
  int32_t* total = params.start_rows + head * num_keys;
  for (int64_t i = 0; i < num_keys; ++i) {
    if (count[i] > 0) __atomic_fetch_add(total + i, count[i], __ATOMIC_RELAXED);
  }
}

}  // namespace

int64_t dense_mask_workspace_bytes(const DenseMaskParams& params) {
  return params.execution.num_threads * 2 * params.seqlen_k;
}

void run_dense_mask(const DenseMaskParams& params) {
  std::atomic<int32_t> faults{0}, fault_value{kNoValue};
  const int64_t heads = params.batch * params.num_heads, num_keys = params.seqlen_k;
  const int64_t items_per_head = ceil_div(params.seqlen_q, kRowsPerItem);
  std::memset(params.start_rows, 0, heads * num_keys * sizeof(int32_t));
  const auto count_items = [&](int thread, int64_t begin, int64_t end) {
    uint8_t* scratch = static_cast<uint8_t*>(params.execution.workspace) + thread * 2 * num_keys;
    for (int64_t item = begin; item < end; ++item) {
      with_mask_type(params.type, [&](auto mask) {
        count_rows<decltype(mask)>(params, item / items_per_head,
                                   item % items_per_head * kRowsPerItem, scratch, faults,
                                   fault_value);
      });
    }
  };
  parallel_for(params.execution.num_threads, heads * items_per_head,
               grain_for(kRowsPerItem * num_keys), count_items);
  for (int64_t i = 0; i < heads * num_keys; ++i) {
    const int64_t own_row = i % num_keys - (num_keys - params.seqlen_q);
    params.start_rows[i] = start_row(own_row, params.start_rows[i]);
  }
  params.verdict[0] = faults;
  params.verdict[1] = fault_value;
}

}  // namespace rrattn::cpu
