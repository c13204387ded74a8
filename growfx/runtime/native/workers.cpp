#include "workers.h"

#if defined(__wasm__)
#define GROWFX_ONE_THREAD
#endif

#ifndef GROWFX_ONE_THREAD
#include <algorithm>
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

// Steps follow each other within microseconds, so threads wait awake for a while (about half a millisecond) before they
// sleep, and give way to others between: on a machine with too few cores the one waited for may need this very core.
constexpr int SPINS = 20000, SPINS_A_YIELD = 32;

void spin(int i) {
  if (i % SPINS_A_YIELD == SPINS_A_YIELD - 1) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

struct Workers::Pool {
  // Also where a thread cannot be had: it ends those that there are.
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closing = true;
    }
    begin.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  // The gate of a round of tasks: how many threads are inside, whether more may enter, the number of the round. The caller
  // waits for those inside alone, not for threads that come too late to help.
  static constexpr uint64_t INSIDE = 0xffff, OPEN = 0x10000, ROUND = 0x20000;
  alignas(64) std::atomic<uint64_t> gate{0};
  alignas(64) std::atomic<int> asleep{0};
  std::atomic<bool> caller_asleep{false}, closing{false};
  std::mutex mutex;
  std::condition_variable begin, end;
  std::vector<std::thread> threads;
  // Tasks that a thread begins with: the same part of every step, as what it wrote for the last is in its cache. After
  // them it takes what the others have left.
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  // Of the round that is open; they change only while nobody is inside and the gate is closed.
  std::vector<Part> parts;
  int64_t used = 0;  // of the parts
  void (*function)(void*, int64_t, int) = nullptr;
  void* context = nullptr;

  void deal(int64_t tasks) {
    used = std::min<int64_t>(tasks, static_cast<int64_t>(parts.size()));
    for (int64_t i = 0; i < used; ++i) {
      parts[static_cast<size_t>(i)].next = tasks * i / used;
      parts[static_cast<size_t>(i)].end = tasks * (i + 1) / used;
    }
  }
  void work(int thread) {
    for (int64_t i = 0; i < used; ++i) {
      Part& part = parts[static_cast<size_t>((thread + i) % used)];
      while (part.next.load() < part.end) {
        const int64_t task = part.next.fetch_add(1);
        if (task < part.end) function(context, task, thread);
      }
    }
  }
  bool has_new(uint64_t seen) const {
    const uint64_t now = gate.load();
    return (now & OPEN) && now / ROUND != seen;
  }
  bool enter(uint64_t& seen) {
    for (uint64_t now = gate.load(); (now & OPEN) && now / ROUND != seen;)
      if (gate.compare_exchange_weak(now, now + 1)) {
        seen = now / ROUND;
        return true;
      }
    return false;
  }
  void leave() {
    if (((gate.fetch_sub(1) - 1) & (OPEN | INSIDE)) || !caller_asleep.load()) return;
    std::lock_guard<std::mutex> lock(mutex);
    end.notify_one();
  }
  void loop(int thread) {
    for (uint64_t seen = 0;;) {
      for (int i = 0; i < SPINS && !closing.load() && !has_new(seen); ++i) spin(i);
      if (!closing.load() && !has_new(seen)) {
        std::unique_lock<std::mutex> lock(mutex);
        ++asleep;  // before the gate is looked at once more: whoever opens it sees either a sleeper or this look
        begin.wait(lock, [&] { return closing.load() || has_new(seen); });
        --asleep;
      }
      if (closing.load()) return;
      if (!enter(seen)) continue;
      work(thread);
      leave();
    }
  }
};

Workers::Workers(int threads) : threads_(threads) {
  if (threads_ == 1) return;
  pool_ = std::make_unique<Pool>();
  pool_->parts = std::vector<Pool::Part>(static_cast<size_t>(threads_));
  for (int i = 1; i < threads_; ++i) pool_->threads.emplace_back([pool = pool_.get(), i] { pool->loop(i); });
}

Workers::~Workers() = default;

void Workers::run(int64_t tasks, void (*function)(void*, int64_t, int), void* context) {
  if (!pool_ || tasks < 2) {
    for (int64_t task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  Pool& pool = *pool_;
  pool.function = function, pool.context = context;
  pool.deal(tasks);
  pool.gate = (pool.gate.load() / Pool::ROUND + 1) * Pool::ROUND + Pool::OPEN;
  if (pool.asleep.load()) {
    std::lock_guard<std::mutex> lock(pool.mutex);
    pool.begin.notify_all();
  }
  pool.work(0);
  pool.gate.fetch_sub(Pool::OPEN);
  const auto empty = [&] { return !(pool.gate.load() & Pool::INSIDE); };
  for (int i = 0; i < SPINS && !empty(); ++i) spin(i);
  if (empty()) return;
  std::unique_lock<std::mutex> lock(pool.mutex);
  pool.caller_asleep = true;
  pool.end.wait(lock, empty);
  pool.caller_asleep = false;
}

#endif

}  // namespace growfx_native
