// Steps that compute on numbers: operations on single ones, norms, reductions, pooling.

#include <algorithm>
#include <cstring>

#include "steps.h"

namespace growfx_native {

namespace {

constexpr int64_t TASK = int64_t{16} << 10;

int64_t product_of(const Sizes& sizes, size_t from, size_t end) {
  int64_t count = 1;
  for (size_t i = from; i < end; ++i) count *= sizes[i];
  return count;
}

// -- one operand ------------------------------------------------------------------------------------------------------

class PointwiseStep final : public Ready {
 public:
  void run(int64_t task, float*) const override {
    const int64_t from = task * TASK, count = std::min(TASK, elements - from);
    if (x != y) std::memcpy(y + from, x + from, static_cast<size_t>(count) * sizeof(float));
    kernels->post(post.data(), static_cast<int64_t>(post.size()), y + from, count, from);
  }
  const float* x = nullptr;
  float* y = nullptr;
  int64_t elements = 0;
  std::vector<PostCall> post;
  const Kernels* kernels = nullptr;
};

}  // namespace

Made make_pointwise(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 0) || !a.inputs[0].data || a.inputs[0].elements != a.output.elements)
    return refused(complaint, "expected one input of the output's size");
  auto step = std::make_unique<PointwiseStep>();
  step->x = a.inputs[0].data, step->y = a.output.data, step->elements = a.output.elements;
  step->post = a.post, step->kernels = a.kernels;
  step->does_post = true;
  step->tasks = (a.output.elements + TASK - 1) / TASK;
  return step;
}

// -- two and three operands -------------------------------------------------------------------------------------------

namespace {

// Sizes of the output, and how far each operand moves along each axis; axes along which all move alike are one.
struct Broadcast {
  Sizes sizes;
  std::vector<Sizes> strides;

  bool build(const std::vector<Tensor>& operands, const Sizes& output) {
    std::vector<Sizes> all;
    for (const Tensor& x : operands) {
      if (!x.data || x.sizes.size() > output.size()) return false;
      Sizes strides(output.size(), 0);
      int64_t step = 1;
      for (size_t back = 0; back < x.sizes.size(); ++back) {
        const int64_t size = x.sizes[x.sizes.size() - 1 - back];
        const size_t axis = output.size() - 1 - back;
        if (size != 1 && size != output[axis]) return false;
        strides[axis] = size == 1 ? 0 : step;
        step *= size;
      }
      all.push_back(strides);
    }
    strides.resize(operands.size());
    for (size_t axis = 0; axis < output.size(); ++axis) {
      if (output[axis] == 1) continue;
      bool joins = !sizes.empty();
      for (size_t i = 0; i < all.size(); ++i)
        joins = joins && strides[i].back() == all[i][axis] * output[axis];
      if (joins) sizes.back() *= output[axis];
      else sizes.push_back(output[axis]);
      for (size_t i = 0; i < all.size(); ++i) {
        if (joins) strides[i].back() = all[i][axis];
        else strides[i].push_back(all[i][axis]);
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      for (Sizes& s : strides) s.push_back(0);
    }
    return true;
  }
  // Where an operand is at the beginning of a run along the last axis.
  int64_t at(size_t operand, int64_t run) const {
    int64_t where = 0;
    for (size_t axis = sizes.size() - 1; axis-- > 0;) {
      where += run % sizes[axis] * strides[operand][axis];
      run /= sizes[axis];
    }
    return where;
  }
};

class RunsStep : public Ready {
 public:
  // Runs along the last axis, so many a task.
  void run(int64_t task, float*) const override {
    const int64_t length = broadcast.sizes.back(), end = std::min(runs, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; ++i) compute(i, length);
    if (!post.empty()) {
      const int64_t from = task * per_task * length;
      kernels->post(post.data(), static_cast<int64_t>(post.size()), y + from, end * length - from, from);
    }
  }
  bool prepare(const Arguments& a) {
    if (!broadcast.build(a.inputs, a.output.sizes)) return false;
    for (const Tensor& x : a.inputs) operands.push_back(x.data);
    y = a.output.data, kernels = a.kernels, post = a.post;
    const int64_t length = broadcast.sizes.back();
    runs = a.output.elements / length;
    per_task = units_a_task(runs, TASK / length, a.threads);
    tasks = (runs + per_task - 1) / per_task;
    does_post = true;
    return true;
  }

  uint8_t op = 0;

 protected:
  virtual void compute(int64_t run, int64_t length) const = 0;

  Broadcast broadcast;
  std::vector<const float*> operands;
  std::vector<PostCall> post;
  float* y = nullptr;
  const Kernels* kernels = nullptr;
  int64_t runs = 0, per_task = 1;
};

class BinaryStep final : public RunsStep {
  void compute(int64_t run, int64_t length) const override {
    kernels->binary(op, operands[0] + broadcast.at(0, run), broadcast.strides[0].back(),
                    operands[1] + broadcast.at(1, run), broadcast.strides[1].back(), y + run * length, length);
  }
};

class SelectStep final : public RunsStep {
  void compute(int64_t run, int64_t length) const override {
    const float* p[3];
    int64_t step[3];
    for (size_t i = 0; i < 3; ++i) p[i] = operands[i] + broadcast.at(i, run), step[i] = broadcast.strides[i].back();
    for (int64_t i = 0; i < length; ++i)
      y[run * length + i] = p[0][i * step[0]] != 0.0f ? p[1][i * step[1]] : p[2][i * step[2]];
  }
};

}  // namespace

Made make_binary(const Arguments& a, std::string& complaint) {
  const int64_t op = a.has(2, 2, 1) ? a.step->ints[0] : -1;
  if (op < 0 || op >= static_cast<int64_t>(Op::COUNT) || !has_operand(static_cast<Op>(op)))
    return refused(complaint, "expected two inputs and an operation");
  auto step = std::make_unique<BinaryStep>();
  step->op = static_cast<uint8_t>(op);
  if (!step->prepare(a)) return refused(complaint, "operands that do not broadcast to the output");
  return step;
}

Made make_select(const Arguments& a, std::string& complaint) {
  if (!a.has(3, 3, 0)) return refused(complaint, "expected a condition and two inputs");
  auto step = std::make_unique<SelectStep>();
  if (!step->prepare(a)) return refused(complaint, "operands that do not broadcast to the output");
  return step;
}

// -- pooling ----------------------------------------------------------------------------------------------------------

namespace {

template <class Call>
class CallStep final : public Ready {
 public:
  using Function = void (*)(const Call&, int64_t);
  void run(int64_t task, float*) const override {
    const int64_t end = std::min(count, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; ++i) function(call, i);
  }
  // `size` numbers are read for each of `count` calls.
  void spread(int64_t calls, int64_t size) {
    count = calls;
    per_task = units_a_task(count, TASK / std::max<int64_t>(size, 1), threads);
    tasks = (count + per_task - 1) / per_task;
  }

  Call call{};
  Function function = nullptr;
  int64_t count = 0, per_task = 1;
  int threads = 1;
};

template <class Call>
std::unique_ptr<CallStep<Call>> call_step(const Arguments& a, void (*function)(const Call&, int64_t)) {
  auto step = std::make_unique<CallStep<Call>>();
  step->call.x = a.inputs[0].data;
  step->call.y = a.output.data;
  step->function = function;
  step->threads = a.threads;
  return step;
}

}  // namespace

namespace {

constexpr int64_t MOST = 1 << 20;
// In a window over a plane.
constexpr int64_t MOST_PLACES = 1 << 12;

const char* check_axis(const Geometry& g, size_t i, bool adaptive) {
  if (g.window[i] < 1 || g.window[i] > MOST || g.stride[i] < 1 || g.stride[i] > MOST || g.padding[i] < 0 ||
      g.padding[i] > g.window[i] / 2 || g.dilation[i] < 1 || g.dilation[i] > MOST || g.out[i] > g.in[i] * MOST)
    return "an impossible geometry";
  // The last window begins inside the input or the padding before it.
  return !adaptive && (g.out[i] - 1) * g.stride[i] >= g.in[i] + g.padding[i] ? "an output of the wrong size" : "";
}

}  // namespace

// ints: axes; windows, strides, paddings, dilations; maximum, count padding, adaptive; floats: the divisor.
Made make_pool(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 1) || !a.inputs[0].data) return refused(complaint, "expected one input");
  const auto& ints = a.step->ints;
  const int64_t axes = ints[0];
  const Sizes &x = a.inputs[0].sizes, &y = a.output.sizes;
  if (axes < 1 || axes > 3 || ints.size() != static_cast<size_t>(4 * axes + 4) || x.size() != y.size() ||
      x.size() < static_cast<size_t>(axes))
    return refused(complaint, "an impossible geometry");
  Geometry g;
  PoolKind kind;
  const size_t first = x.size() - static_cast<size_t>(axes), flags = static_cast<size_t>(4 * axes) + 1;
  kind.maximum = ints[flags] != 0, kind.count_padding = ints[flags + 1] != 0, kind.adaptive = ints[flags + 2] != 0;
  kind.divisor = a.real(0, 0.0f);
  for (size_t i = 0; i < first; ++i)
    if (x[i] != y[i]) return refused(complaint, "an output of the wrong size");
  for (size_t i = 0; i < static_cast<size_t>(axes); ++i) {
    const size_t to = 3 - static_cast<size_t>(axes) + i, n = static_cast<size_t>(axes);
    g.in[to] = x[first + i], g.out[to] = y[first + i];
    g.window[to] = ints[1 + i], g.stride[to] = ints[1 + n + i];
    g.padding[to] = ints[1 + 2 * n + i], g.dilation[to] = ints[1 + 3 * n + i];
    const char* problem = check_axis(g, to, kind.adaptive);
    if (*problem) return refused(complaint, problem);
  }
  const int64_t places = g.window[0] * g.window[1] * g.window[2];
  if (is_flat(g) && places <= MOST_PLACES && !kind.adaptive) return make_plane_pool(a, g, kind, complaint);
  auto step = call_step<Pool>(a, a.kernels->pool);
  Pool& c = step->call;
  for (int i = 0; i < 3; ++i) {
    c.in[i] = g.in[i], c.out[i] = g.out[i], c.window[i] = g.window[i];
    c.stride[i] = g.stride[i], c.padding[i] = g.padding[i], c.dilation[i] = g.dilation[i];
  }
  c.maximum = kind.maximum, c.count_padding = kind.count_padding, c.adaptive = kind.adaptive, c.divisor = kind.divisor;
  c.planes = product_of(x, 0, first);
  step->spread(c.planes, c.in[0] * c.in[1] * c.in[2]);
  return step;
}

// -- norms ------------------------------------------------------------------------------------------------------------

namespace {

// Weight and bias that stand behind the input, where the flags say so.
bool read_affine(const Arguments& a, size_t flags, int64_t elements, const float*& weight, const float*& bias) {
  size_t at = 1;
  for (const float** target : {&weight, &bias}) {
    *target = nullptr;
    if (!a.step->ints[flags++]) continue;
    if (at >= a.inputs.size() || !a.inputs[at].data || a.inputs[at].elements != elements) return false;
    *target = a.inputs[at++].data;
  }
  return at == a.inputs.size();
}

}  // namespace

// ints: normalised last axes, centred, weight, bias; floats: epsilon.
Made make_layer_norm(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 3, 4) || !a.inputs[0].data || a.inputs[0].sizes != a.output.sizes)
    return refused(complaint, "expected an input of the output's size");
  const int64_t axes = a.step->ints[0];
  if (axes < 1 || axes > a.output.rank()) return refused(complaint, "axes that are not there");
  auto step = call_step<Norm>(a, a.kernels->norm);
  Norm& c = step->call;
  const size_t rank = a.output.sizes.size();
  c.size = product_of(a.output.sizes, rank - static_cast<size_t>(axes), rank);
  c.outer = a.output.elements / c.size, c.parts = 1, c.cycle = 1;
  c.centred = a.step->ints[1] != 0, c.epsilon = a.real(0, 1e-5f);
  if (!read_affine(a, 2, c.size, c.weight, c.bias)) return refused(complaint, "a weight of the wrong size");
  step->spread(c.outer, c.size);
  return step;
}

// ints: groups, weight, bias; floats: epsilon.
Made make_group_norm(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 3, 3) || !a.inputs[0].data || a.inputs[0].sizes != a.output.sizes || a.output.rank() < 2)
    return refused(complaint, "expected an input of the output's size");
  const int64_t groups = a.step->ints[0], channels = a.output.sizes[1];
  if (groups < 1 || channels % groups) return refused(complaint, "an impossible number of groups");
  auto step = call_step<Norm>(a, a.kernels->norm);
  Norm& c = step->call;
  c.outer = a.output.sizes[0] * groups, c.parts = channels / groups, c.cycle = groups;
  c.size = product_of(a.output.sizes, 2, a.output.sizes.size());
  c.centred = c.by_part = true, c.epsilon = a.real(0, 1e-5f);
  if (!read_affine(a, 1, channels, c.weight, c.bias)) return refused(complaint, "a weight of the wrong size");
  step->spread(c.outer, c.parts * c.size);
  return step;
}

// -- reductions -------------------------------------------------------------------------------------------------------

// ints: kind, first axis, axes; floats: the correction of a variance. The axes stay with size 1 or are left out.
Made make_reduce(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 3) || !a.inputs[0].data) return refused(complaint, "expected one input");
  const int64_t kind = a.step->ints[0], first = a.step->ints[1], axes = a.step->ints[2];
  const Sizes& x = a.inputs[0].sizes;
  const int64_t rank = a.inputs[0].rank();
  if (kind < SUM || kind > L2_NORM || first < 0 || axes < 1 || first > rank || axes > rank - first)
    return refused(complaint, "axes that are not there");
  auto step = call_step<Reduce>(a, a.kernels->reduce);
  Reduce& c = step->call;
  const size_t from = static_cast<size_t>(first), end = static_cast<size_t>(first + axes);
  c.outer = product_of(x, 0, from), c.size = product_of(x, from, end), c.inner = product_of(x, end, x.size());
  c.kind = static_cast<int32_t>(kind), c.correction = a.real(0, 0.0f);
  if (a.output.elements != c.outer * c.inner) return refused(complaint, "an output of the wrong size");
  step->spread(c.outer, c.size * c.inner);
  return step;
}

// ints: axis, logarithm.
Made make_softmax(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 2) || !a.inputs[0].data || a.inputs[0].sizes != a.output.sizes)
    return refused(complaint, "expected an input of the output's size");
  const int64_t axis = a.step->ints[0];
  if (axis < 0 || axis >= a.output.rank()) return refused(complaint, "an axis that is not there");
  auto step = call_step<Softmax>(a, a.kernels->softmax);
  Softmax& c = step->call;
  const Sizes& x = a.output.sizes;
  const size_t at = static_cast<size_t>(axis);
  c.outer = product_of(x, 0, at), c.size = x[at], c.inner = product_of(x, at + 1, x.size());
  c.logarithm = a.step->ints[1] != 0, c.safe = a.step->ints.size() > 2 && a.step->ints[2] != 0;
  step->spread(c.outer, c.size * c.inner);
  return step;
}

}  // namespace growfx_native
