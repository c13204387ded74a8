// Transposed convolutions, by adding each entry's product to where it belongs.

#include <algorithm>

#include "steps.h"

namespace growfx_native {

namespace {

struct Entry {
  int64_t channel, place[3];
  float value;
};

class DeconvolutionStep final : public Ready {
 public:
  // One channel of one image each.
  void run(int64_t task, float*) const override {
    const int64_t image = task / outputs, o = task % outputs, group = o / (outputs / groups);
    const int64_t size = in[0] * in[1] * in[2], out_size = out[0] * out[1] * out[2];
    float* const to = y + task * out_size;
    std::fill_n(to, out_size, bias ? bias[o] : 0.0f);
    for (const Entry& entry : entries[static_cast<size_t>(o)]) {
      const int64_t channel = group * (channels / groups) + entry.channel;
      add(entry, x + (image * channels + channel) * size, to);
    }
  }

  std::vector<std::vector<Entry>> entries;  // by output channel
  int64_t channels = 0, outputs = 0, groups = 1;
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {}, dilation[3] = {1, 1, 1};
  const float *x = nullptr, *bias = nullptr;
  float* y = nullptr;

 private:
  void add(const Entry& entry, const float* from, float* to) const {
    int64_t shift[3];
    for (int i = 0; i < 3; ++i) shift[i] = entry.place[i] * dilation[i] - padding[i];
    for (int64_t d = 0; d < in[0]; ++d) {
      const int64_t z = d * stride[0] + shift[0];
      if (z < 0 || z >= out[0]) continue;
      for (int64_t h = 0; h < in[1]; ++h) {
        const int64_t r = h * stride[1] + shift[1];
        if (r < 0 || r >= out[1]) continue;
        const float* const row = from + (d * in[1] + h) * in[2];
        float* const to_row = to + (z * out[1] + r) * out[2];
        for (int64_t w = 0; w < in[2]; ++w) {
          const int64_t at = w * stride[2] + shift[2];
          if (at >= 0 && at < out[2]) to_row[at] += entry.value * row[w];
        }
      }
    }
  }
};

}  // namespace

// ints: axes; strides, paddings, dilations; groups. The weight is (inputs, outputs / groups, ...).
Made make_deconvolution(const Arguments& a, std::string& complaint) {
  if (!a.has(2, 3, 5) || !a.inputs[1].constant || !a.inputs[0].data)
    return refused(complaint, "expected an input and a constant weight");
  const auto& ints = a.step->ints;
  const Sizes &x = a.inputs[0].sizes, &w = a.inputs[1].sizes, &y = a.output.sizes;
  const int64_t axes = ints[0];
  if (axes < 1 || axes > 3 || ints.size() != static_cast<size_t>(3 * axes + 2)) return refused(complaint, "an impossible geometry");
  const size_t n = static_cast<size_t>(axes), rank = n + 2;
  if (x.size() != rank || w.size() != rank || y.size() != rank) return refused(complaint, "operands of the wrong number of axes");
  auto step = std::make_unique<DeconvolutionStep>();
  step->groups = ints[3 * n + 1];
  step->channels = x[1], step->outputs = y[1];
  const bool fits = step->groups >= 1 && x[0] == y[0] && w[0] == x[1] && x[1] % step->groups == 0 &&
                    y[1] % step->groups == 0 && w[1] == y[1] / step->groups;
  if (!fits || (a.inputs.size() == 3 && (!a.inputs[2].data || a.inputs[2].elements != y[1])))
    return refused(complaint, "shapes that do not fit its weight");
  int64_t window[3] = {1, 1, 1};
  for (size_t i = 0; i < n; ++i) {
    const size_t to = 3 - n + i;
    step->in[to] = x[i + 2], step->out[to] = y[i + 2], window[to] = w[i + 2];
    step->stride[to] = ints[1 + i], step->padding[to] = ints[1 + n + i], step->dilation[to] = ints[1 + 2 * n + i];
    for (const int64_t value : {step->stride[to], step->padding[to], step->dilation[to]})
      if (value < 0 || value > 1 << 20) return refused(complaint, "an impossible geometry");
  }
  const Constant& weight = *a.inputs[1].constant;
  const int64_t taps = window[0] * window[1] * window[2], per_group = y[1] / step->groups;
  step->entries.resize(static_cast<size_t>(y[1]));
  for (size_t i = 0; i < (weight.sparse ? weight.positions.size() : static_cast<size_t>(weight.elements)); ++i) {
    const int64_t p = weight.sparse ? weight.positions[i] : static_cast<int64_t>(i), tap = p % taps;
    const int64_t channel = p / taps / per_group, group = channel / (x[1] / step->groups);
    const int64_t o = group * per_group + p / taps % per_group;
    const Entry entry{channel % (x[1] / step->groups),
                      {tap / (window[1] * window[2]), tap / window[2] % window[1], tap % window[2]},
                      weight.values[i]};
    step->entries[static_cast<size_t>(o)].push_back(entry);
  }
  step->x = a.inputs[0].data, step->y = a.output.data;
  step->bias = a.inputs.size() == 3 ? a.inputs[2].data : nullptr;
  step->tasks = x[0] * y[1];
  return step;
}

}  // namespace growfx_native
