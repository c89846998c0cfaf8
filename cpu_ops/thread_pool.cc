#include "thread_pool.h"

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace apex {
namespace {

// How long an idle worker spins before it sleeps. Waking one costs about as much.
constexpr std::chrono::microseconds kSpin{50};
constexpr uint64_t kUnclaimed = 0xffffffffu;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or for kSpin; returns done().
template <class Done>
bool SpinUntil(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// XLA flushes subnormals on the threads that call the op, and threads inherit the setting: without
// this the bits of a result would depend on the thread.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

int64_t NowNs() {
  const auto since_boot = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since_boot).count();
}

void RunOn([[maybe_unused]] int cpu) {
#if defined(__linux__)
  if (cpu < 0 || cpu >= CPU_SETSIZE) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus) : open_spans_(num_threads) {
  for (int i = 0; i < num_threads; ++i) open_spans_[i].span.thread = i;
  for (int i = 1; i < num_threads; ++i) {
    const int cpu = i < static_cast<int>(cpus.size()) ? cpus[i] : -1;
    workers_.emplace_back([this, i, cpu] { Work(i, cpu); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t num_tasks, const std::function<void(int64_t)>& task) {
  std::lock_guard<std::mutex> region(region_);
  DefaultFloatEnvironment environment;
  if (num_tasks <= 0) return;
  task_ = &task;
  num_tasks_ = num_tasks;
  num_done_.store(0, std::memory_order_relaxed);
  const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(epoch << 32 | static_cast<uint64_t>(num_tasks));
  if (num_tasks > 1 && num_asleep_.load() > 0) {
    // A worker that found no work holds the lock until it waits.
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
  }
  while (RunOneTask(0)) {
  }
  const auto done = [&] { return num_done_.load(std::memory_order_acquire) == num_tasks; };
  while (!SpinUntil(done)) std::this_thread::yield();
  if (max_kept_spans_ > 0) KeepSpans();
}

void ThreadPool::Record(int64_t capacity) {
  std::lock_guard<std::mutex> region(region_);
  max_kept_spans_ = capacity;
  kept_spans_ = std::vector<ThreadSpan>();
  kept_spans_.reserve(capacity);
  num_dropped_ = 0;
}

int64_t ThreadPool::TakeSpans(ThreadSpan* spans, int64_t max_spans, int64_t* num_dropped) {
  std::lock_guard<std::mutex> region(region_);
  const int64_t num_taken = std::min<int64_t>(max_spans, kept_spans_.size());
  std::copy_n(kept_spans_.begin(), num_taken, spans);
  kept_spans_.erase(kept_spans_.begin(), kept_spans_.begin() + num_taken);
  *num_dropped = std::exchange(num_dropped_, 0);
  return num_taken;
}

void ThreadPool::KeepSpans() {
  for (OpenSpan& open : open_spans_) {
    if (open.span.num_tasks == 0) continue;
    if (static_cast<int64_t>(kept_spans_.size()) < max_kept_spans_) {
      kept_spans_.push_back(open.span);
    } else {
      ++num_dropped_;
    }
    open.span.num_tasks = 0;
  }
}

bool ThreadPool::HasWork() const { return (ticket_.load() & kUnclaimed) != 0; }

bool ThreadPool::RunOneTask(int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if ((ticket & kUnclaimed) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
  ThreadSpan& span = open_spans_[thread].span;
  const bool is_recording = max_kept_spans_ > 0;
  if (is_recording && span.num_tasks == 0) span.start_ns = NowNs();
  (*task_)(num_tasks_ - static_cast<int64_t>(ticket & kUnclaimed));
  if (is_recording) {
    span.end_ns = NowNs();
    ++span.num_tasks;
  }
  num_done_.fetch_add(1, std::memory_order_acq_rel);
  return true;
}

void ThreadPool::Work(int thread, int cpu) {
  RunOn(cpu);
  std::fesetenv(FE_DFL_ENV);
  while (!stop_) {
    while (RunOneTask(thread)) {
    }
    if (SpinUntil([&] { return HasWork() || stop_.load(); })) continue;
    std::unique_lock<std::mutex> lock(sleep_);
    ++num_asleep_;
    wake_.wait(lock, [&] { return HasWork() || stop_.load(); });
    --num_asleep_;
  }
}

}  // namespace apex
