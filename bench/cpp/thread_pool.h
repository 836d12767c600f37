// The threads of the standalone benchmarks. Workers live as long as the pool; items are handed out in order by one
// atomic counter; the caller is worker 0. A waiting worker spins for some microseconds, so that one kernel after
// another starts at once, and then sleeps, so that an idle pool takes no time from anyone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/executor.h"

namespace lcore::bench {

class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(int workers) {
    for (int worker = 1; worker < workers; ++worker) threads_.emplace_back([this, worker] { serve(worker); });
  }

  ~ThreadPool() override {
    start({nullptr, nullptr, 0});
    for (std::thread& thread : threads_) thread.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int workers() const override { return static_cast<int>(threads_.size()) + 1; }

 protected:
  void run_items(int64_t items, Item item, const void* context) override {
    start({item, context, items});
    take_items(0);
    wait(done_, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  struct Job {
    Item item;  // nullptr: the pool ends
    const void* context;
    int64_t items;
  };

  static constexpr int kSpins = 4000;  // some 50 microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  // The mutex is held while a condition changes (start, the last worker's signal), so no wake-up is lost.
  template <class Condition>
  void wait(std::condition_variable& signal, const Condition& holds) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (holds()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    signal.wait(lock, holds);
  }

  void start(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.fetch_add(1, std::memory_order_release);  // publishes the three stores above
    }
    started_.notify_all();
  }

  void take_items(int worker) {
    for (int64_t i = next_.fetch_add(1); i < job_.items; i = next_.fetch_add(1)) job_.item(job_.context, i, worker);
  }

  void serve(int worker) {
    for (uint64_t seen = 1;; ++seen) {
      wait(started_, [&] { return jobs_.load(std::memory_order_acquire) == seen; });
      if (job_.item == nullptr) return;
      take_items(worker);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
        }
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> threads_;
  Job job_{};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};       // threads that have not finished the current job
  std::atomic<uint64_t> jobs_{0};  // started so far; the next one starts when all threads have finished this one
  std::mutex mutex_;
  std::condition_variable started_;
  std::condition_variable done_;
};

// LCORE_NUM_THREADS, or as many as the machine has.
inline int thread_count() {
  const char* text = std::getenv("LCORE_NUM_THREADS");
  if (text == nullptr || *text == '\0') {
    const unsigned threads = std::thread::hardware_concurrency();
    return threads == 0 ? 1 : static_cast<int>(threads);
  }
  char* end = nullptr;
  const long threads = std::strtol(text, &end, 10);
  if (*end != '\0' || threads < 1 || threads > 4096) {
    throw std::invalid_argument(std::string("LCORE_NUM_THREADS must be 1 to 4096, got ") + text);
  }
  return static_cast<int>(threads);
}

}  // namespace lcore::bench
