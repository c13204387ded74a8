// A pool of threads that share the tasks of a step.

#pragma once

#include <cstdint>
#include <memory>

namespace growfx_native {

class Workers {
 public:
  explicit Workers(int threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int threads() const { return threads_; }
  // Calls `function(context, task, thread)` for each task; returns when all are done.
  void run(int64_t tasks, void (*function)(void*, int64_t task, int thread), void* context);

 private:
  struct Pool;
  int threads_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace growfx_native
