// Threads of the CPU stages: a pool of this library's own, and how many of them to use.
//
// Not OpenMP's pool, which a forked child inherits without its threads and then waits for, and
// whose threads spin for work until, on a busy machine, the work itself has to wait for a
// processor.
#pragma once

#include <cstdint>

namespace rrattn::cpu {

// Threads of a call that names no number: as many as OpenMP would take (OMP_NUM_THREADS,
// omp_set_num_threads), but no more than there are processors for this process, and no more than
// the CPU quota of its container pays for.
int default_num_threads();

using ParallelBody = void (*)(void* context, int thread, int64_t begin, int64_t end);
void run_parallel(int num_threads, int64_t num_items, int64_t grain, ParallelBody body,
                  void* context);

// Calls body(thread, begin, end) for parts of [0, num_items) that are taken in turn, `grain` items
// at a time, by at most num_threads threads, of numbers below that; returns when all is done. Fewer
// threads where there are fewer parts, and only the caller's where another call has the pool. Only
// started work is waited for, never a thread that found no processor to run on.
template <typename Body>
void parallel_for(int num_threads, int64_t num_items, int64_t grain, Body body) {
  run_parallel(
      num_threads, num_items, grain,
      [](void* context, int thread, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(thread, begin, end);
      },
      &body);
}

// Items of this much work each, in multiply-adds, that are worth a thread's turn: some 20 us.
inline int64_t grain_for(int64_t work_per_item) {
  constexpr int64_t kWorkPerTurn = int64_t{1} << 20;
  return work_per_item < kWorkPerTurn ? kWorkPerTurn / (work_per_item + 1) + 1 : 1;
}

}  // namespace rrattn::cpu
