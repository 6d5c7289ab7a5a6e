#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu_quota.h"

namespace rrattn::cpu {

namespace {

// One call of parallel_for.
struct Job {
  ParallelBody body;
  void* context;
  int64_t num_items, grain;
  std::atomic<int64_t> next{0};

  void work(int thread) {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= num_items) return;
      body(context, thread, begin, std::min(begin + grain, num_items));
    }
  }
};

// Polls the condition for some 10 us. A thread does so before it sleeps, since the parts of a stage
// follow each other closely.
template <typename Condition>
void spin_until(const Condition& condition) {
  for (int i = 0; i < 256 && !condition(); ++i) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
  }
}

class Pool {
 public:
  void run(Job& job, int num_threads) {
    const std::unique_lock<std::mutex> owner(in_use_, std::try_to_lock);
    if (!owner) return job.work(0);
    start_workers(num_threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      places_ = std::min(num_threads - 1, num_workers_);
      joined_ = 0;
      offered_.store(true, std::memory_order_relaxed);
    }
    for (int i = 0; i < places_; ++i) job_offered_.notify_one();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // a worker that comes now comes too late
    offered_.store(false, std::memory_order_relaxed);
    if (active_ == 0) return;
    lock.unlock();
    spin_until([this] { return active_.load(std::memory_order_relaxed) == 0; });
    lock.lock();
    job_done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void start_workers(int wanted) {
    if (num_workers_ >= wanted) return;
    sigset_t all, before;  // signals are for the process's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; num_workers_ < wanted; ++num_workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: the ones there are will do.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    for (;;) {
      spin_until([this] { return offered_.load(std::memory_order_relaxed); });
      std::unique_lock<std::mutex> lock(mutex_);
      job_offered_.wait(lock, [this] { return job_ != nullptr && joined_ < places_; });
      Job& job = *job_;
      const int thread = ++joined_;
      if (joined_ == places_) offered_.store(false, std::memory_order_relaxed);
      ++active_;
      lock.unlock();
      job.work(thread);
      lock.lock();
      if (--active_ == 0) job_done_.notify_one();
    }
  }

  std::mutex in_use_;  // one job at a time
  int num_workers_ = 0;
  std::mutex mutex_;  // guards what follows
  std::condition_variable job_offered_, job_done_;
  Job* job_ = nullptr;
  int places_ = 0, joined_ = 0;       // workers that the job takes, and that have come
  std::atomic<int> active_{0};        // workers at work
  std::atomic<bool> offered_{false};  // job_ has places left; read without the mutex
};

// Never destroyed: its threads wait for work until the process ends. A forked child does not have
// these threads, so it makes a pool of its own.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  return new Pool;
}();

}  // namespace

int default_num_threads() {
  static const int limit = std::min(omp_get_num_procs(), cpu_quota());
  return std::clamp(omp_get_max_threads(), 1, std::max(limit, 1));
}

void run_parallel(int num_threads, int64_t num_items, int64_t grain, ParallelBody body,
                  void* context) {
  Job job{body, context, num_items, grain};
  const int64_t turns = (num_items + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, turns));
  if (threads <= 1) return job.work(0);
  pool->run(job, threads);
}

}  // namespace rrattn::cpu
