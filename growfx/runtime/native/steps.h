// Steps of a network at one batch size: checked against the shapes that they have there, with everything worked out
// that a run needs.

#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "network.h"

namespace growfx_native {

// A value or constant at a batch size.
struct Tensor {
  Sizes sizes;
  int64_t elements = 0;
  float* data = nullptr;               // of a sparse constant: NULL
  const Constant* constant = nullptr;  // NULL for a value

  int64_t rank() const { return static_cast<int64_t>(sizes.size()); }
};

// What a step is made of.
struct Arguments {
  const Step* step = nullptr;
  std::vector<Tensor> inputs;
  Tensor output;
  std::vector<PostCall> post;
  const Kernels* kernels = nullptr;
  int threads = 1;
  int64_t batch = 1;

  bool has(size_t inputs_least, size_t inputs_most, size_t ints_least) const {
    return inputs.size() >= inputs_least && inputs.size() <= inputs_most && step->ints.size() >= ints_least;
  }
  float real(size_t i, float otherwise) const { return i < step->floats.size() ? step->floats[i] : otherwise; }
};

// Ready to run: so many tasks, each of which writes its own part of the output.
class Ready {
 public:
  virtual ~Ready() = default;
  virtual void run(int64_t task, float* scratch) const = 0;

  int64_t tasks = 1;
  int64_t scratch = 0;  // floats that each task needs
  bool does_post = false;
};

using Made = std::unique_ptr<Ready>;

// Units of work that make a task: about so many, in a number of tasks that threads share evenly.
inline int64_t units_a_task(int64_t units, int64_t about, int threads) {
  const int64_t tasks = (units + std::max<int64_t>(about, 1) - 1) / std::max<int64_t>(about, 1);
  const int64_t even = tasks < 2 ? 1 : (tasks + threads - 1) / threads * threads;
  return std::max<int64_t>((units + even - 1) / even, 1);
}

// Each returns NULL with a complaint where the step does not fit its operands.
using Maker = Made (*)(const Arguments&, std::string& complaint);
// NULL for a kernel that this library does not have.
Maker maker_of(const std::string& kernel);

inline Made refused(std::string& complaint, const char* text) {
  complaint = text;
  return nullptr;
}

// Of windows, with three axes; those that are not there have size 1.
struct Geometry {
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, window[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {},
          dilation[3] = {1, 1, 1}, groups = 1;
};
struct PoolKind {
  bool maximum = false, count_padding = false, adaptive = false;
  float divisor = 0.0f;  // 0: the numbers in the window
};

// Windows over the last two axes, of which the two steps below make rows.
bool is_flat(const Geometry&);
// With operands that are known to fit; every output channel reads one input channel.
Made make_depthwise(const Arguments&, const Geometry&, std::string&);
Made make_plane_pool(const Arguments&, const Geometry&, const PoolKind&, std::string&);

Made make_convolution(const Arguments&, std::string&);
Made make_gated_convolution(const Arguments&, std::string&);
Made make_linear(const Arguments&, std::string&);
Made make_product(const Arguments&, std::string&);
Made make_attention(const Arguments&, std::string&);
Made make_deconvolution(const Arguments&, std::string&);

Made make_view(const Arguments&, std::string&);
Made make_concat(const Arguments&, std::string&);
Made make_pad(const Arguments&, std::string&);
Made make_gather(const Arguments&, std::string&);
Made make_resize(const Arguments&, std::string&);

Made make_pointwise(const Arguments&, std::string&);
Made make_binary(const Arguments&, std::string&);
Made make_select(const Arguments&, std::string&);
Made make_pool(const Arguments&, std::string&);
Made make_layer_norm(const Arguments&, std::string&);
Made make_group_norm(const Arguments&, std::string&);
Made make_reduce(const Arguments&, std::string&);
Made make_softmax(const Arguments&, std::string&);

}  // namespace growfx_native
