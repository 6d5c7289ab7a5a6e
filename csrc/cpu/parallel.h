// Threads of the CPU stages: a pool of this library's own, and how many of them to use.
//
// It is not OpenMP's pool. A forked child inherits that one without its threads, and then waits for
// them. And its threads spin while they wait for work: on a busy machine the work itself then has
// to wait for a processor.
#pragma once

#include <cstdint>

namespace rrattn::cpu {

// Threads of a call that gives no number: as many as OpenMP would take (OMP_NUM_THREADS,
// omp_set_num_threads), but no more than this process has processors, and no more than the CPU
// quota of its container pays for.
int default_num_threads();

using ParallelBody = void (*)(void* context, int thread, int64_t begin, int64_t end);
void run_parallel(int num_threads, int64_t num_items, int64_t grain, ParallelBody body,
                  void* context);

// Calls body(thread, begin, end) for parts of [0, num_items), of `grain` items each, and returns
// when all are done. At most num_threads threads, numbered from 0, take the parts in turn: fewer
// where there are fewer parts, and the caller's alone while another call has the pool. The caller
// waits only for work that was started, never for a thread that found no processor to run on.
template <typename Body>
void parallel_for(int num_threads, int64_t num_items, int64_t grain, Body body) {
  run_parallel(
      num_threads, num_items, grain,
      [](void* context, int thread, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(thread, begin, end);
      },
      &body);
}

// The same for items of several calls, one call's after the other's: body(thread, call, begin, end)
// for parts of [0, count_of(call)). No thread waits for one call's to be done before it goes on with
// the next one's.
template <typename CountOf, typename Body>
void parallel_for_calls(int num_threads, int64_t num_calls, const CountOf& count_of, int64_t grain,
                        Body body) {
  int64_t num_items = 0;
  for (int64_t call = 0; call < num_calls; ++call) num_items += count_of(call);
  parallel_for(num_threads, num_items, grain, [&](int thread, int64_t begin, int64_t end) {
    int64_t first = 0;  // of the call
    for (int64_t call = 0; call < num_calls && first < end; ++call) {
      const int64_t count = count_of(call);
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < count ? end - first : count;
      if (from < to) body(thread, call, from, to);
      first += count;
    }
  });
}

// How many items, of so many multiply-adds each, are worth a thread's turn: some 20 us of work.
inline int64_t grain_for(int64_t work_per_item) {
  constexpr int64_t kWorkPerTurn = int64_t{1} << 20;
  return work_per_item < kWorkPerTurn ? kWorkPerTurn / (work_per_item + 1) + 1 : 1;
}

}  // namespace rrattn::cpu
