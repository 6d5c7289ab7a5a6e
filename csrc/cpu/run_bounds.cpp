#include "run_bounds.h"

#include "parallel.h"

namespace rrattn::cpu {

void compute_run_bounds(const Visibility& visibility, int64_t run_length, int num_threads,
                        RunBounds* bounds) {
  const RowBounds& layout = visibility.row_bounds;
  const int64_t num_runs = ceil_div(visibility.seqlen_k, run_length);
  const auto compute = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_key = i % num_runs * run_length, head = i / num_runs;
      const int64_t end_key = std::min(first_key + run_length, visibility.seqlen_k);
      const int32_t* at = row_bounds_of(layout, head / layout.num_heads, head % layout.num_heads);
      bounds[i] = run_bounds(layout, visibility.causal, at, first_key, end_key);
    }
  };
  constexpr int64_t kWorkPerKey = 64;  // reads and comparisons, as multiply-adds of the kernels
  parallel_for(num_threads, visibility.num_run_bounds(run_length),
               grain_for(run_length * kWorkPerKey), compute);
}

}  // namespace rrattn::cpu
