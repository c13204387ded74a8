#include "workers.h"

#if defined(__wasm__)
#define GROWFX_ONE_THREAD
#endif

#ifndef GROWFX_ONE_THREAD
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#endif

namespace growfx_native {

#ifdef GROWFX_ONE_THREAD

struct Workers::Pool {};

Workers::Workers(int) : threads_(1) {}
Workers::~Workers() = default;
void Workers::run(int64_t tasks, void (*function)(void*, int64_t, int), void* context) {
  for (int64_t task = 0; task < tasks; ++task) function(context, task, 0);
}

#else

struct Workers::Pool {
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable begin, end;
  std::atomic<uint64_t> round{0};
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};
  int64_t tasks = 0;
  void (*function)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  bool closing = false;

  void work(int thread) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) function(context, task, thread);
  }
  void loop(int thread) {
    // Steps follow each other within microseconds, so wait a little before going to sleep.
    constexpr int SPINS = 2000;
    for (uint64_t seen = 0;;) {
      for (int i = 0; i < SPINS && round.load() == seen; ++i) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> lock(mutex);
        begin.wait(lock, [&] { return closing || round.load() != seen; });
        if (closing) return;
        seen = round.load();
      }
      work(thread);
      if (busy.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        end.notify_one();
      }
    }
  }
};

Workers::Workers(int threads) : threads_(threads) {
  if (threads_ == 1) return;
  pool_ = std::make_unique<Pool>();
  for (int i = 1; i < threads_; ++i) pool_->threads.emplace_back([this, i] { pool_->loop(i); });
}

Workers::~Workers() {
  if (!pool_) return;
  {
    std::lock_guard<std::mutex> lock(pool_->mutex);
    pool_->closing = true;
  }
  pool_->begin.notify_all();
  for (std::thread& thread : pool_->threads) thread.join();
}

void Workers::run(int64_t tasks, void (*function)(void*, int64_t, int), void* context) {
  if (!pool_ || tasks < 2) {
    for (int64_t task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(pool_->mutex);
    pool_->tasks = tasks, pool_->function = function, pool_->context = context;
    pool_->next = 0;
    pool_->busy = threads_ - 1;
    ++pool_->round;
  }
  pool_->begin.notify_all();
  pool_->work(0);
  std::unique_lock<std::mutex> lock(pool_->mutex);
  pool_->end.wait(lock, [&] { return pool_->busy.load() == 0; });
}

#endif

}  // namespace growfx_native
