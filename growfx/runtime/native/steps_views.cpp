// Steps that move numbers: views, concatenation, padding, gathering, resizing.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "steps.h"

namespace growfx_native {

namespace {

// Numbers that one task moves, at least.
constexpr int64_t TASK = int64_t{16} << 10;

// -- views ------------------------------------------------------------------------------------------------------------

enum ViewOp : int64_t { PERMUTE = 0, SLICE = 1, EXPAND = 2, FLIP = 3, INSERT = 4, DROP = 5, UNFOLD = 6 };

// Sizes, strides and offset into a tensor, as operations on axes change them.
struct Strided {
  Sizes sizes, strides;
  int64_t offset = 0;

  explicit Strided(const Sizes& from) : sizes(from), strides(from.size()) {
    int64_t step = 1;
    for (size_t i = from.size(); i-- > 0;) strides[i] = step, step *= from[i];
  }
  size_t rank() const { return sizes.size(); }
  void insert(size_t at, int64_t size, int64_t stride) {
    sizes.insert(sizes.begin() + static_cast<std::ptrdiff_t>(at), size);
    strides.insert(strides.begin() + static_cast<std::ptrdiff_t>(at), stride);
  }
};

class Operations {
 public:
  Operations(const std::vector<int64_t>& ints, int64_t batch) : ints_(ints), batch_(batch) {}
  bool is_done() const { return at_ == ints_.size(); }

  const char* apply(Strided& v) {
    const int64_t op = next();
    if (op == PERMUTE) return permute(v);
    const int64_t axis = next();
    if (axis < 0 || axis > static_cast<int64_t>(v.rank()) - (op != INSERT)) return "an axis that is not there";
    const size_t i = static_cast<size_t>(axis);
    switch (op) {
      case SLICE: return slice(v, i);
      case EXPAND: return expand(v, i);
      case FLIP:
        v.offset += v.strides[i] * (v.sizes[i] - 1);
        v.strides[i] = -v.strides[i];
        return "";
      case INSERT:
        if (v.rank() == MAX_RANK) return "too many axes";
        v.insert(i, 1, 0);
        return "";
      case DROP:
        if (v.sizes[i] != 1) return "an axis that cannot be dropped";
        v.sizes.erase(v.sizes.begin() + axis);
        v.strides.erase(v.strides.begin() + axis);
        return "";
      case UNFOLD: return unfold(v, i);
      default: return "an unknown view";
    }
  }

 private:
  int64_t next() { return at_ < ints_.size() ? ints_[at_++] : -1; }
  int64_t size() {
    const int64_t per_batch = next(), fixed = next();
    const bool fits = per_batch >= 0 && per_batch <= MOST_ELEMENTS && std::abs(fixed) <= MOST_ELEMENTS;
    return fits ? per_batch * batch_ + fixed : -1;
  }
  const char* permute(Strided& v) {
    const Strided before = v;
    uint32_t seen = 0;
    for (size_t i = 0; i < v.rank(); ++i) {
      const int64_t from = next();
      if (from < 0 || from >= static_cast<int64_t>(v.rank()) || seen >> from & 1) return "an impossible permutation";
      seen |= 1u << from;
      v.sizes[i] = before.sizes[static_cast<size_t>(from)];
      v.strides[i] = before.strides[static_cast<size_t>(from)];
    }
    return "";
  }
  const char* slice(Strided& v, size_t i) {
    const int64_t start = next(), step = next(), length = size();
    const bool fits = start >= 0 && start < v.sizes[i] && step >= 1 && step <= MOST_ELEMENTS && length >= 1 &&
                      (length - 1) <= (v.sizes[i] - 1 - start) / step;
    if (!fits) return "a slice outside its tensor";
    v.offset += start * v.strides[i];
    v.strides[i] *= step;
    v.sizes[i] = length;
    return "";
  }
  const char* expand(Strided& v, size_t i) {
    const int64_t length = size();
    if (v.sizes[i] != 1 || length < 1 || length > MOST_ELEMENTS) return "an axis that cannot be expanded";
    v.sizes[i] = length;
    v.strides[i] = 0;
    return "";
  }
  const char* unfold(Strided& v, size_t i) {
    const int64_t window = next(), step = next();
    if (window < 1 || window > v.sizes[i] || step < 1 || v.rank() == MAX_RANK) return "a window that does not fit";
    const int64_t stride = v.strides[i];
    v.sizes[i] = (v.sizes[i] - window) / step + 1;
    v.strides[i] *= step;
    v.insert(v.rank(), window, stride);
    return "";
  }

  const std::vector<int64_t>& ints_;
  int64_t batch_;
  size_t at_ = 0;
};

// Neighbouring axes that are one in memory become one, axes of size 1 none.
void merge(Strided& v) {
  Strided merged{Sizes{}};
  merged.offset = v.offset;
  for (size_t i = 0; i < v.rank(); ++i) {
    if (v.sizes[i] == 1) continue;
    if (merged.rank() && merged.strides.back() == v.strides[i] * v.sizes[i]) {
      merged.sizes.back() *= v.sizes[i];
      merged.strides.back() = v.strides[i];
    } else {
      merged.insert(merged.rank(), v.sizes[i], v.strides[i]);
    }
  }
  if (merged.rank() == 0) merged.insert(0, 1, 1);
  v = merged;
}

class ViewStep final : public Ready {
 public:
  explicit ViewStep(const Strided& v) : view(v) {}

  // Matrices of the last two axes (one where there is one axis alone), so many a task.
  void run(int64_t task, float*) const override {
    const size_t outer = view.rank() < 2 ? 0 : view.rank() - 2;
    const int64_t end = std::min(matrices, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; ++i) {
      int64_t rest = i, at = view.offset;
      for (size_t axis = outer; axis-- > 0;) {
        at += rest % view.sizes[axis] * view.strides[axis];
        rest /= view.sizes[axis];
      }
      copy(x + at, y + i * rows * columns);
    }
  }

  Strided view;
  const float* x = nullptr;
  float* y = nullptr;
  int64_t matrices = 1, per_task = 1, rows = 1, columns = 1;

 private:
  void copy(const float* from, float* to) const {
    const int64_t column = view.strides.back(), row = view.rank() < 2 ? 0 : view.strides[view.rank() - 2];
    if (column == 1) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * columns, from + r * row, static_cast<size_t>(columns) * sizeof(float));
      return;
    }
    constexpr int64_t TILE = 16;
    for (int64_t r0 = 0; r0 < rows; r0 += TILE)
      for (int64_t c0 = 0; c0 < columns; c0 += TILE)
        for (int64_t r = r0; r < std::min(rows, r0 + TILE); ++r)
          for (int64_t c = c0; c < std::min(columns, c0 + TILE); ++c) to[r * columns + c] = from[r * row + c * column];
  }
};

}  // namespace

Made make_view(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 0) || !a.inputs[0].data) return refused(complaint, "expected one input");
  Strided v(a.inputs[0].sizes);
  Operations operations(a.step->ints, a.batch);
  while (!operations.is_done()) {
    const char* problem = operations.apply(v);
    if (*problem) return refused(complaint, problem);
    // Every step of the way a view of what is there, so nothing outside is ever read.
    if (element_count(v.sizes) < 1) return refused(complaint, "a view that is too large");
  }
  if (v.sizes != a.output.sizes) return refused(complaint, "an output of the wrong size");
  merge(v);
  auto step = std::make_unique<ViewStep>(v);
  step->x = a.inputs[0].data, step->y = a.output.data;
  step->columns = v.sizes.back();
  step->rows = v.rank() < 2 ? 1 : v.sizes[v.rank() - 2];
  step->matrices = a.output.elements / (step->rows * step->columns);
  step->per_task = units_a_task(step->matrices, TASK / (step->rows * step->columns), a.threads);
  step->tasks = (step->matrices + step->per_task - 1) / step->per_task;
  return step;
}

// -- concatenation ----------------------------------------------------------------------------------------------------

namespace {

int64_t product_of(const Sizes& sizes, size_t from, size_t end) {
  int64_t count = 1;
  for (size_t i = from; i < end; ++i) count *= sizes[i];
  return count;
}

class ConcatStep final : public Ready {
 public:
  void run(int64_t task, float*) const override {
    float* to = y + task * row;
    for (const auto& [from, count] : parts) {
      std::memcpy(to, from + task * count, static_cast<size_t>(count) * sizeof(float));
      to += count;
    }
  }
  std::vector<std::pair<const float*, int64_t>> parts;
  float* y = nullptr;
  int64_t row = 0;
};

bool has_axis(int64_t axis, const Tensor& tensor) { return axis >= 0 && axis < tensor.rank(); }

}  // namespace

Made make_concat(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1024, 1) || !has_axis(a.step->ints[0], a.output)) return refused(complaint, "expected inputs and an axis");
  const size_t axis = static_cast<size_t>(a.step->ints[0]), rank = a.output.sizes.size();
  auto step = std::make_unique<ConcatStep>();
  int64_t total = 0;
  for (const Tensor& x : a.inputs) {
    bool fits = x.data && x.sizes.size() == rank;
    for (size_t i = 0; fits && i < rank; ++i) fits = i == axis || x.sizes[i] == a.output.sizes[i];
    if (!fits) return refused(complaint, "inputs of different shapes");
    total += x.sizes[axis];
    step->parts.emplace_back(x.data, product_of(x.sizes, axis, rank));
  }
  if (total != a.output.sizes[axis]) return refused(complaint, "an output of the wrong size");
  step->y = a.output.data;
  step->row = product_of(a.output.sizes, axis, rank);
  step->tasks = product_of(a.output.sizes, 0, axis);
  return step;
}

// -- padding and gathering --------------------------------------------------------------------------------------------

namespace {

// Where each place of an axis comes from; -1 for the value of a constant padding.
using Source = std::vector<int64_t>;

class IndexedStep final : public Ready {
 public:
  // A row along the last axis each.
  void run(int64_t task, float*) const override {
    const size_t last = sources.size() - 1;
    int64_t rest = task, at = 0;
    bool inside = true;
    for (size_t axis = last; axis-- > 0;) {
      const int64_t from = sources[axis][static_cast<size_t>(rest % sizes[axis])];
      rest /= sizes[axis];
      inside = inside && from >= 0;
      at += from * strides[axis];
    }
    float* const to = y + task * sizes[last];
    for (int64_t i = 0; i < sizes[last]; ++i) {
      const int64_t from = sources[last][static_cast<size_t>(i)];
      to[i] = inside && from >= 0 ? x[at + from] : value;
    }
  }

  std::vector<Source> sources;
  Sizes sizes, strides;
  const float* x = nullptr;
  float* y = nullptr;
  float value = 0.0f;
};

Made indexed(const Arguments& a, std::vector<Source> sources, std::string& complaint) {
  for (size_t i = 0; i < sources.size(); ++i)
    if (static_cast<int64_t>(sources[i].size()) != a.output.sizes[i]) return refused(complaint, "an output of the wrong size");
  auto step = std::make_unique<IndexedStep>();
  step->sources = std::move(sources);
  step->sizes = a.output.sizes;
  step->strides = Strided(a.inputs[0].sizes).strides;
  step->x = a.inputs[0].data, step->y = a.output.data;
  step->value = a.real(0, 0.0f);
  step->tasks = a.output.elements / a.output.sizes.back();
  return step;
}

enum PadMode : int64_t { CONSTANT = 0, REFLECT = 1, REPLICATE = 2, CIRCULAR = 3 };

int64_t padded_from(int64_t i, int64_t size, int64_t mode) {
  if (i >= 0 && i < size) return i;
  if (mode == REPLICATE) return i < 0 ? 0 : size - 1;
  if (mode == REFLECT) return i < 0 ? -i : 2 * (size - 1) - i;
  if (mode == CIRCULAR) return i < 0 ? i + size : i - size;
  return -1;
}

}  // namespace

// ints: mode, then before and after each axis; floats: the value.
Made make_pad(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 1) || !a.inputs[0].data || a.output.rank() != a.inputs[0].rank() || a.output.rank() < 1)
    return refused(complaint, "expected one input");
  const auto& ints = a.step->ints;
  const size_t rank = a.output.sizes.size();
  if (ints.size() != 1 + 2 * rank || ints[0] < CONSTANT || ints[0] > CIRCULAR) return refused(complaint, "an impossible padding");
  std::vector<Source> sources(rank);
  for (size_t i = 0; i < rank; ++i) {
    const int64_t before = ints[1 + 2 * i], after = ints[2 + 2 * i], size = a.inputs[0].sizes[i];
    if (std::abs(before) > MOST_ELEMENTS || std::abs(after) > MOST_ELEMENTS || size + before + after != a.output.sizes[i])
      return refused(complaint, "an output of the wrong size");
    for (int64_t p = -before; p < size + after; ++p) {
      const int64_t from = padded_from(p, size, ints[0]);
      if (from >= size || (from < 0 && ints[0] != CONSTANT)) return refused(complaint, "a padding that is too wide");
      sources[i].push_back(from);
    }
  }
  return indexed(a, std::move(sources), complaint);
}

// ints: axis, then the indices.
Made make_gather(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 2) || !a.inputs[0].data || a.output.rank() != a.inputs[0].rank() ||
      !has_axis(a.step->ints[0], a.output))
    return refused(complaint, "expected one input, an axis and indices");
  const size_t axis = static_cast<size_t>(a.step->ints[0]), rank = a.output.sizes.size();
  const Sizes& sizes = a.inputs[0].sizes;
  std::vector<Source> sources(rank);
  for (size_t i = 0; i < rank; ++i) {
    if (i != axis)
      for (int64_t p = 0; p < sizes[i]; ++p) sources[i].push_back(p);
    else sources[i].assign(a.step->ints.begin() + 1, a.step->ints.end());
  }
  for (const int64_t index : sources[axis])
    if (index < 0 || index >= sizes[axis]) return refused(complaint, "an index that is not there");
  return indexed(a, std::move(sources), complaint);
}

// -- resizing ---------------------------------------------------------------------------------------------------------

namespace {

enum ResizeMode : int64_t { NEAREST = 0, LINEAR = 1, CUBIC = 2, NEAREST_EXACT = 3 };

struct Taps {
  int count = 1;
  std::vector<int64_t> index;  // [out][count]
  std::vector<float> weight;
};

// Keys' convolution with a = -0.75, as torch has it.
void cubic_weights(float t, float (&w)[4]) {
  constexpr float A = -0.75f;
  const auto near = [](float x) { return ((A + 2) * x - (A + 3)) * x * x + 1; };
  const auto far = [](float x) { return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A; };
  w[0] = far(t + 1), w[1] = near(t), w[2] = near(1 - t), w[3] = far(2 - t);
}

Taps taps_of(int64_t mode, bool corners, int64_t in, int64_t out, float scale) {
  Taps taps;
  taps.count = mode == LINEAR ? 2 : mode == CUBIC ? 4 : 1;
  const auto put = [&](int64_t index, float weight) {
    taps.index.push_back(std::clamp<int64_t>(index, 0, in - 1));
    taps.weight.push_back(weight);
  };
  for (int64_t i = 0; i < out; ++i) {
    const float at = static_cast<float>(i);
    if (mode == NEAREST || mode == NEAREST_EXACT) {
      put(static_cast<int64_t>(std::floor((mode == NEAREST ? at : at + 0.5f) * scale)), 1.0f);
      continue;
    }
    float source = corners ? at * scale : (at + 0.5f) * scale - 0.5f;
    if (mode == LINEAR) source = std::max(source, 0.0f);
    source = std::min(source, static_cast<float>(in));
    const float low = std::floor(source), t = source - low;
    const int64_t first = static_cast<int64_t>(low);
    if (mode == LINEAR) {
      put(first, 1.0f - t);
      put(first + 1, t);
    } else {
      float weights[4];
      cubic_weights(t, weights);
      for (int k = 0; k < 4; ++k) put(first - 1 + k, weights[k]);
    }
  }
  return taps;
}

class ResizeStep final : public Ready {
 public:
  void run(int64_t task, float*) const override {
    const float* const from = x + task * in[0] * in[1] * in[2];
    float* to = y + task * out[0] * out[1] * out[2];
    for (int64_t d = 0; d < out[0]; ++d)
      for (int64_t h = 0; h < out[1]; ++h)
        for (int64_t w = 0; w < out[2]; ++w) *to++ = number(from, d, h, w);
  }

  Taps axes[3];
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  const float* x = nullptr;
  float* y = nullptr;

 private:
  float number(const float* from, int64_t d, int64_t h, int64_t w) const {
    const Taps &zs = axes[0], &ys = axes[1], &xs = axes[2];
    float total = 0.0f;
    for (int64_t i = d * zs.count; i < (d + 1) * zs.count; ++i)
      for (int64_t j = h * ys.count; j < (h + 1) * ys.count; ++j) {
        const float* const row = from + (zs.index[i] * in[1] + ys.index[j]) * in[2];
        float sum = 0.0f;
        for (int64_t k = w * xs.count; k < (w + 1) * xs.count; ++k) sum += xs.weight[k] * row[xs.index[k]];
        total += zs.weight[i] * ys.weight[j] * sum;
      }
    return total;
  }
};

}  // namespace

// ints: mode, number of last axes, whether corners are aligned; floats: places of the input for one of the output.
Made make_resize(const Arguments& a, std::string& complaint) {
  if (!a.has(1, 1, 3) || !a.inputs[0].data || a.output.rank() != a.inputs[0].rank())
    return refused(complaint, "expected one input");
  const int64_t mode = a.step->ints[0], axes = a.step->ints[1];
  const bool fits = mode >= NEAREST && mode <= NEAREST_EXACT && axes >= 1 && axes <= 3 && axes <= a.output.rank() &&
                    a.step->floats.size() == static_cast<size_t>(axes);
  if (!fits) return refused(complaint, "an unknown way to resize");
  const size_t first = static_cast<size_t>(a.output.rank() - axes);
  for (size_t i = 0; i < first; ++i)
    if (a.output.sizes[i] != a.inputs[0].sizes[i]) return refused(complaint, "an output of the wrong size");
  auto step = std::make_unique<ResizeStep>();
  step->axes[0] = step->axes[1] = step->axes[2] = taps_of(NEAREST, false, 1, 1, 1.0f);
  for (size_t i = 0; i < static_cast<size_t>(axes); ++i) {
    const size_t to = 3 - static_cast<size_t>(axes) + i;
    const float scale = a.step->floats[i];
    if (!(scale >= 0.0f && scale < 65536.0f)) return refused(complaint, "an impossible scale");
    step->in[to] = a.inputs[0].sizes[first + i], step->out[to] = a.output.sizes[first + i];
    step->axes[to] = taps_of(mode, a.step->ints[2] != 0, step->in[to], step->out[to], scale);
  }
  step->x = a.inputs[0].data, step->y = a.output.data;
  step->tasks = product_of(a.output.sizes, 0, first);
  return step;
}

}  // namespace growfx_native
