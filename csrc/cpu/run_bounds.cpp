#include "run_bounds.h"

namespace rrattn::cpu {

void compute_run_bounds(const Visibility& visibility, int64_t run_length, int num_threads,
                        RunBounds* bounds) {
  const RowBounds& layout = visibility.row_bounds;
  const int64_t num_runs = ceil_div(visibility.seqlen_k, run_length);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < visibility.num_run_bounds(run_length); ++i) {
    const int64_t first_key = i % num_runs * run_length, head = i / num_runs;
    const int64_t end_key = std::min(first_key + run_length, visibility.seqlen_k);
    const int32_t* at = row_bounds_of(layout, head / layout.num_heads, head % layout.num_heads);
    bounds[i] = run_bounds(layout, visibility.causal, at, first_key, end_key);
  }
}

}  // namespace rrattn::cpu
