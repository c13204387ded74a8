// A network that is ready to run at one batch size.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "network.h"
#include "steps.h"
#include "workers.h"

namespace growfx_native {

// Memory for floats on a cache line, with room before and behind: registers may read past the ends.
class Buffer {
 public:
  bool reserve(int64_t floats);
  float* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char[], Free> memory_;
  float* data_ = nullptr;
  int64_t size_ = 0;
};

class Session {
  struct Prepared {
    std::unique_ptr<Ready> ready;
    std::vector<PostCall> post;  // what the step does not do itself
    float* output = nullptr;
    int64_t elements = 0;
  };

 public:
  // Reads a network that may take so many bytes for each row of a batch; "" or what is wrong with it.
  std::string open(const uint8_t* data, size_t size, int64_t row_bytes);
  // Works out what a run of so many rows needs; "" or why the network does not run at this batch size.
  std::string prepare(int64_t rows);
  // As many rows as were prepared for.
  void run(int64_t rows, const float* const* inputs, float* const* outputs);
  void set_threads(int threads);

  // Whether what is wrong is that more memory is needed than the caller allows.
  bool is_over_limit() const { return over_limit_; }
  const Network& network() const { return network_; }
  const Kernels& kernels() const { return *kernels_; }

 private:
  std::string open_constants();
  std::string prepare_steps(int64_t batch);
  std::string place(int64_t batch);
  std::string reserve_scratch(int64_t floats);
  bool affords(int64_t floats);
  std::string too_large();
  std::string make_step(size_t index, int64_t batch);
  void find_once();
  int64_t part_of(int64_t batch) const;
  void run_part(int64_t row, const float* const* inputs, float* const* outputs);
  void run_step(size_t index);
  Tensor operand(uint32_t id) const;

  Network network_;
  const Kernels* kernels_ = &kernels_here();
  std::unique_ptr<Workers> workers_ = std::make_unique<Workers>(1);
  int64_t batch_ = 0;       // rows that are computed together
  bool by_rows_ = false;    // whether a batch may be computed in parts
  int64_t row_floats_ = 0;  // of the buffers for one row
  int64_t row_bytes_ = 0, kept_bytes_ = 0;            // allowed for a row; of constants that became dense
  int64_t used_bytes_ = 0, allowed_bytes_ = 0;        // of the batch that is prepared
  int64_t scratch_floats_ = 0;                        // of each thread
  bool over_limit_ = false;
  std::vector<Tensor> values_, constants_;
  std::vector<Buffer> slots_;
  std::vector<Buffer> scratch_;  // one for each thread
  std::vector<Prepared> prepared_;
  // Steps that depend on constants alone are run when a batch size is prepared.
  std::vector<char> once_, computed_;                 // by step; by slot
  std::vector<std::unique_ptr<Constant>> weights_;    // computed ones
};

}  // namespace growfx_native
