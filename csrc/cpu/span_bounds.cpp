#include "span_bounds.h"

#include "parallel.h"

namespace rrattn::cpu {

void compute_span_bounds(const Visibility& visibility, int64_t span_length, int num_threads,
                         SpanBounds* bounds) {
  const RowBounds& layout = visibility.row_bounds;
  const int64_t num_spans = ceil_div(visibility.seqlen_k, span_length);
  const auto compute = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_key = i % num_spans * span_length, head = i / num_spans;
      const int64_t end_key = std::min(first_key + span_length, visibility.seqlen_k);
      const int32_t* at = row_bounds_of(layout, head / layout.num_heads, head % layout.num_heads);
      bounds[i] = span_bounds(layout, visibility.causal, at, first_key, end_key);
    }
  };
  constexpr int64_t kWorkPerKey = 64;  // reads and comparisons, as multiply-adds of the kernels
  parallel_for(num_threads, visibility.num_span_bounds(span_length),
               grain_for(span_length * kWorkPerKey), compute);
}

}  // namespace rrattn::cpu
