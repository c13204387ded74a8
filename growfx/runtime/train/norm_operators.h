// Batch normalisation as torch sees it.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>

#include "layout.h"
#include "norm.h"
#include "operators.h"

namespace {

inline const float* floats(const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; }

template <class F>
void for_channels(int64_t channels, int64_t count, const F& use) {
  at::parallel_for(0, channels, std::max<int64_t>(1, COPY_WORK / std::max<int64_t>(count, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t c = begin; c < end; ++c) use(c);
                   });
}

// (out, mean, variance): of the batch where `mean` and `variance` are not given.
inline Three norm(const at::Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                  const Optional& variance, const Optional& added, double eps, bool relu) {
  const at::Tensor source = with_inner_batch(x), other = added ? with_inner_batch(*added) : at::Tensor();
  at::Tensor out = empty_inner(x.sizes(), source.options());
  const int64_t channels = x.size(1), count = x.numel() / channels;
  const int64_t in = plane_stride(source), plus = added ? plane_stride(other) : 0, onto = plane_stride(out);
  at::Tensor means = at::empty({channels}, source.options()), variances = at::empty({channels}, source.options());
  const float *const p = source.const_data_ptr<float>(), *const q = added ? other.const_data_ptr<float>() : nullptr;
  float *const to = out.mutable_data_ptr<float>(), *const m = means.mutable_data_ptr<float>(),
               *const v = variances.mutable_data_ptr<float>();
  const float *const w = floats(weight), *const b = floats(bias), *const gm = floats(mean), *const gv = floats(variance);
  for_channels(channels, count, [&](int64_t c) {
    if (gm) m[c] = gm[c], v[c] = gv[c];
    else {
      const Pair<double> found = moments(p + c * in, count);
      m[c] = static_cast<float>(found.first), v[c] = static_cast<float>(found.second);
    }
    const float scale = static_cast<float>((w ? w[c] : 1.0f) / std::sqrt(double(v[c]) + eps));
    normalise(p + c * in, q ? q + c * plus : nullptr, count, {m[c], scale, b ? b[c] : 0.0f}, relu, to + c * onto);
  });
  return {out, means, variances};
}

// Gradients of x, weight, bias and what was added; `out`: the result, needed where something was added and rectified.
inline Four norm_backward(const at::Tensor& grad, const at::Tensor& x, const Optional& weight, const Optional& bias,
                          const at::Tensor& mean, const at::Tensor& variance, const Optional& out, double eps,
                          bool relu, bool fixed, std::array<bool, 4> wanted) {
  const at::Tensor source = with_inner_batch(x), gradient = with_inner_batch(grad);
  const int64_t channels = x.size(1), count = x.numel() / channels;
  Four found;
  auto& [dx, dweight, dbias, dadded] = found;
  if (wanted[0]) dx = empty_inner(x.sizes(), source.options());
  dweight = at::empty({channels}, source.options()), dbias = at::empty({channels}, source.options());
  if (wanted[3] && relu) dadded = empty_inner(x.sizes(), source.options());
  else if (wanted[3]) dadded = gradient.is_same(grad) ? gradient.clone() : gradient;
  const auto at_channel = [&](const at::Tensor& t, int64_t c) {
    return t.defined() ? t.mutable_data_ptr<float>() + c * plane_stride(t) : nullptr;
  };
  const float *const p = source.const_data_ptr<float>(), *const g = gradient.const_data_ptr<float>(), *const w = floats(weight),
              *const b = floats(bias), *const m = mean.const_data_ptr<float>(), *const v = variance.const_data_ptr<float>(), *const y = floats(out);
  float *const dw = dweight.mutable_data_ptr<float>(), *const db = dbias.mutable_data_ptr<float>();
  for_channels(channels, count, [&](int64_t c) {
    const double inverse = 1 / std::sqrt(double(v[c]) + eps);
    const float scale = static_cast<float>((w ? w[c] : 1.0f) * inverse);
    const Incoming in{p + c * plane_stride(source), g + c * plane_stride(gradient), y ? y + c * plane_stride(*out) : nullptr, m[c], scale, b ? b[c] : 0.0f, relu};
    const NormGradient of = normalise_backward(in, count, static_cast<float>(inverse), fixed, at_channel(dx, c),
                                               relu ? at_channel(dadded, c) : nullptr);
    dw[c] = of.weight, db[c] = of.bias;
  });
  return found;
}

}  // namespace
