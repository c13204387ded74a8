// Windows over single planes: depthwise convolutions and pooling.

#include <algorithm>

#include "steps.h"

namespace growfx_native {

namespace {

// Floats of the rows that are copied at a time: they stay in the first cache, with what is made of them.
constexpr int64_t FRAME_FLOATS = int64_t{5} << 10;
// Numbers that one task reads, at least.
constexpr int64_t TASK = int64_t{16} << 10;
constexpr int64_t LARGEST = INT32_MAX / 2;
// Strides from which on columns are not sorted by phase.
constexpr int64_t MOST_PHASES = 16;

// Along the last two of three axes of `x`; false where a frame would be too large.
bool build_frame(Frame& f, std::vector<int64_t>& bounds, const Geometry& g, const Tensor& x, int64_t lanes) {
  f.height = g.in[1], f.width = g.in[2], f.out_height = g.out[1], f.out_width = g.out[2];
  f.window_h = g.window[1], f.window_w = g.window[2], f.stride_h = g.stride[1], f.stride_w = g.stride[2];
  f.padding_h = g.padding[1], f.padding_w = g.padding[2], f.dilation_h = g.dilation[1], f.dilation_w = g.dilation[2];
  const int64_t reach_h = (f.window_h - 1) * f.dilation_h, reach_w = (f.window_w - 1) * f.dilation_w;
  f.phases = std::min(f.stride_w, reach_w + 1);
  f.columns = f.out_width + reach_w / f.stride_w;
  // A register that begins at any column of a row ends in it.
  f.phase = (f.columns + 2 * lanes - 2) / lanes * lanes;
  if (f.phases > LARGEST / f.phase) return false;
  f.pitch = f.phases * f.phase;
  const int64_t rows = std::max<int64_t>(FRAME_FLOATS / f.pitch, reach_h + 1);
  f.band = std::clamp<int64_t>((rows - reach_h - 1) / f.stride_h + 1, std::min<int64_t>(4, f.out_height), f.out_height);
  if ((f.band - 1) * f.stride_h + reach_h + 1 > LARGEST / f.pitch) return false;
  for (int64_t p = 0; p < f.phases; ++p) {
    // Column q of this phase is column q * stride + p - padding of the plane.
    const auto first_from = [&](int64_t column) {
      const int64_t at = column + f.padding_w - p;
      return std::clamp<int64_t>(at <= 0 ? 0 : (at + f.stride_w - 1) / f.stride_w, 0, f.columns);
    };
    bounds.push_back(first_from(0));
    bounds.push_back(first_from(f.width));
  }
  f.bounds = bounds.data();
  const int64_t past = (f.columns + 2 * lanes) * f.stride_w - f.padding_w - f.width;
  f.whole = !x.constant && f.stride_w <= 2 && f.padding_w <= BEFORE && past <= BEHIND && f.width <= LARGEST;
  return true;
}

// Where the number of a window at a row and column stands in a frame.
int32_t tap_at(const Frame& f, int64_t row, int64_t column) {
  const int64_t reach = column * f.dilation_w;
  return static_cast<int32_t>(row * f.dilation_h * f.pitch + reach % f.stride_w * f.phase + reach / f.stride_w);
}

int64_t planes_a_task(const Frame& f, int64_t planes, int threads) {
  return units_a_task(planes, TASK / (f.height * f.width), threads);
}

class DepthwiseStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->depthwise(c, task, scratch); }

  Depthwise c{};
  const Kernels* kernels = nullptr;
  std::vector<int64_t> bounds;
  std::vector<uint32_t> start;
  std::vector<int32_t> offset;
  std::vector<PostCall> post;

  void find_entries(const Constant& weight) {
    const Frame& f = c.frame;
    const int64_t taps = f.window_h * f.window_w;
    const auto add = [&](int64_t position) {
      ++start[static_cast<size_t>(position / taps) + 1];
      offset.push_back(tap_at(f, position % taps / f.window_w, position % f.window_w));
    };
    start.assign(static_cast<size_t>(c.outputs) + 1, 0);
    for (const uint32_t position : weight.positions) add(position);
    for (int64_t i = 0; !weight.sparse && i < weight.elements; ++i) add(i);
    for (size_t o = 1; o < start.size(); ++o) start[o] += start[o - 1];
  }
};

}  // namespace

bool is_flat(const Geometry& g) {
  return g.in[0] == 1 && g.out[0] == 1 && g.window[0] == 1 && g.padding[0] == 0 && g.stride[2] <= MOST_PHASES;
}

Made make_depthwise(const Arguments& a, const Geometry& g, std::string& complaint) {
  const Tensor &x = a.inputs[0], &w = a.inputs[1];
  auto step = std::make_unique<DepthwiseStep>();
  Depthwise& c = step->c;
  if (!build_frame(c.frame, step->bounds, g, a.inputs[0], a.kernels->lanes)) return refused(complaint, "an image that is too large");
  c.channels = x.sizes[1], c.outputs = w.sizes[0], c.planes = x.sizes[0] * c.outputs;
  c.per_task = planes_a_task(c.frame, c.planes, a.threads);
  step->find_entries(*w.constant);
  c.rows.start = step->start.data(), c.rows.offset = step->offset.data(), c.rows.value = w.constant->values.data();
  c.rows.bias = a.inputs.size() < 3 ? nullptr : a.inputs[2].data;
  c.x = x.data, c.out = a.output.data;
  step->post = a.post, step->kernels = a.kernels;
  c.post = step->post.data(), c.post_count = static_cast<int64_t>(step->post.size());
  step->does_post = true;
  step->tasks = (c.planes + c.per_task - 1) / c.per_task;
  step->scratch = a.kernels->depthwise_scratch(c);
  return step;
}

// -- pooling ----------------------------------------------------------------------------------------------------------

namespace {

class PlanePoolStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->plane_pool(c, task, scratch); }

  PlanePool c{};
  const Kernels* kernels = nullptr;
  std::vector<int64_t> bounds;
  std::vector<int32_t> taps;
  std::vector<float> counts[2];
};

// Places of each window along an axis that a mean counts: of the input alone, or of the padding too.
std::vector<float> counts_of(const Geometry& g, size_t axis, bool padding, int64_t behind) {
  std::vector<float> counts;
  for (int64_t i = 0; i < g.out[axis]; ++i) {
    const int64_t start = i * g.stride[axis] - g.padding[axis], end = start + g.window[axis];
    const int64_t low = padding ? start : std::max<int64_t>(start, 0);
    const int64_t high = std::min(end, padding ? g.in[axis] + g.padding[axis] : g.in[axis]);
    counts.push_back(static_cast<float>(std::max<int64_t>(high - low, 0)));
  }
  counts.insert(counts.end(), static_cast<size_t>(behind), 1.0f);
  return counts;
}

}  // namespace

Made make_plane_pool(const Arguments& a, const Geometry& g, const PoolKind& kind, std::string& complaint) {
  auto step = std::make_unique<PlanePoolStep>();
  PlanePool& c = step->c;
  if (!build_frame(c.frame, step->bounds, g, a.inputs[0], a.kernels->lanes)) return refused(complaint, "an image that is too large");
  c.planes = a.inputs[0].elements / (g.in[1] * g.in[2]);
  c.per_task = planes_a_task(c.frame, c.planes, a.threads);
  c.maximum = kind.maximum, c.divisor = kind.divisor;
  for (int64_t i = 0; i < g.window[1]; ++i)
    for (int64_t j = 0; j < g.window[2]; ++j) step->taps.push_back(tap_at(c.frame, i, j));
  for (size_t i = 0; i < 2; ++i) step->counts[i] = counts_of(g, i + 1, kind.count_padding, a.kernels->lanes);
  c.taps = step->taps.data(), c.taps_count = static_cast<int64_t>(step->taps.size());
  c.counts_h = step->counts[0].data(), c.counts_w = step->counts[1].data();
  c.x = a.inputs[0].data, c.out = a.output.data;
  step->kernels = a.kernels;
  step->tasks = (c.planes + c.per_task - 1) / c.per_task;
  step->scratch = a.kernels->plane_pool_scratch(c);
  return step;
}

}  // namespace growfx_native
