// The op's own threads. The caller works too, so a pool of one thread has no other.
//
// Tasks are claimed one by one, in order; a caller waits only for tasks that were claimed, never
// for a thread to wake up. Workers spin for a short time after a region, because the next layer's
// call usually follows within it, then sleep. One region at a time: Run waits for its turn.

#ifndef APEX_JAX_CPU_OPS_THREAD_POOL_H_
#define APEX_JAX_CPU_OPS_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace apex {

// What a thread did in one region: from its first task's start to its last one's end, on the
// steady clock. Thread 0 is the caller.
struct ThreadSpan {
  int32_t thread, num_tasks;
  int64_t start_ns, end_ns;
};

class ThreadPool {
 public:
  // Starts num_threads - 1 workers. Worker i runs on cpus[i + 1] alone, or anywhere where cpus is
  // shorter; cpus[0] is the caller's, whose affinity is its own business.
  ThreadPool(int num_threads, std::vector<int> cpus);
  ~ThreadPool();

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(i) for every i in [0, num_tasks), each with the default floating-point environment.
  void Run(int64_t num_tasks, const std::function<void(int64_t)>& task);

  // From the next region on keeps the spans of its threads, `capacity` at most until they are
  // taken, in memory that is allocated here. 0 stops. Forgets what was kept before.
  void Record(int64_t capacity);

  // Moves up to max_spans kept spans to `spans`, region by region, and returns how many.
  // num_dropped: spans that found no room since the last call. Waits for a region that runs.
  int64_t TakeSpans(ThreadSpan* spans, int64_t max_spans, int64_t* num_dropped);

 private:
  // A thread's span of the region that runs, on a cache line of its own.
  struct alignas(64) OpenSpan {
    ThreadSpan span{};
  };

  void Work(int thread, int cpu);
  bool RunOneTask(int thread);
  void KeepSpans();
  bool HasWork() const;

  std::mutex region_;  // held by the caller whose region runs

  // Epoch of the region in the high half, tasks not yet claimed in the low half. A claim decrements
  // it, so task_ and num_tasks_ may be read after a claim: the region ends only when its claims are
  // done.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> num_done_{0};
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t num_tasks_ = 0;

  // Like task_ these change between regions only, under region_; a thread touches its own open span
  // between a claim and its end.
  int64_t max_kept_spans_ = 0;  // 0: not recording
  std::vector<OpenSpan> open_spans_;
  std::vector<ThreadSpan> kept_spans_;
  int64_t num_dropped_ = 0;

  std::atomic<bool> stop_{false};
  std::atomic<int> num_asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace apex

#endif  // APEX_JAX_CPU_OPS_THREAD_POOL_H_
