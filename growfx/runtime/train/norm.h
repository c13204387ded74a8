// Batch normalisation of activations whose batch is innermost, with what commonly follows it in one pass each way:
// a sum with another branch and a rectification.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <cstdint>

#include "../sparse_vectors.h"

namespace {

// Values of `count` vectors at a time, then one by one; `use(i, lanes)`.
template <class Whole, class Single>
void along(int64_t count, const Whole& whole, const Single& single) {
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) whole(i + c * LANES, c);
  }
  for (; i + LANES <= count; i += LANES) whole(i, 0);
  for (; i < count; ++i) single(i);
}

inline double lane_sum(const Vector (&v)[4]) {
  double sum = 0;
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < LANES; ++i) sum += double(v[c][i]);
  return sum;
}

constexpr int64_t SUMMED = 4096;  // values added up in float32 before they join a double

// Sums of two functions of each value over a plane; in blocks, so that float32 does not lose what long sums need.
template <class F>
void plane_sums(int64_t count, double& first, double& second, const F& of) {
  first = second = 0;
  for (int64_t begin = 0; begin < count; begin += SUMMED) {
    const int64_t size = std::min(SUMMED, count - begin);
    Vector a[4] = {}, b[4] = {};
    double c = 0, d = 0;
    along(
        size,
        [&](int64_t i, int chain) {
          const auto [u, v] = of.template at<Vector>(begin + i);
          a[chain] += u, b[chain] += v;
        },
        [&](int64_t i) {
          const auto [u, v] = of.template at<float>(begin + i);
          c += u, d += v;
        });
    first += lane_sum(a) + c, second += lane_sum(b) + d;
  }
}

template <class V>
inline V read(const float* p) {
  if constexpr (std::is_same_v<V, float>) return *p;
  else return load(p);
}
inline void write(float* p, Vector v) { store(p, v); }
inline void write(float* p, float v) { *p = v; }
template <class V>
struct Pair {
  V first, second;
};

struct Deviations {
  const float* x;
  float mean;
  template <class V>
  Pair<V> at(int64_t i) const {
    const V d = read<V>(x + i) - mean;
    return {d, d * d};
  }
};

// Gradient of what was normalised, before the sum and the rectification were: zero where the result was.
struct Incoming {
  const float* x;
  const float* gradient;
  const float* out;  // with a sum; else the result is computed again
  float mean, scale, shift;
  bool relu;
  template <class V>
  V gradient_at(int64_t i, V x_value) const {
    const V g = read<V>(gradient + i);
    if (!relu) return g;
    const V y = out ? read<V>(out + i) : (x_value - mean) * scale + shift;
    return y <= 0.0f ? V{} : g;
  }
  template <class V>
  Pair<V> at(int64_t i) const {
    const V value = read<V>(x + i), g = gradient_at<V>(i, value);
    return {g, g * (value - mean)};
  }
};

// One channel: what normalises it, y = (x - mean) * scale + shift.
struct NormChannel {
  float mean, scale, shift;
};

inline void normalise(const float* x, const float* added, int64_t count, const NormChannel& n, bool relu, float* out) {
  const auto apply = [&](auto zero, int64_t i) {
    using V = decltype(zero);
    V v = (read<V>(x + i) - n.mean) * n.scale + n.shift;
    if (added) v += read<V>(added + i);
    if (relu) v = v < 0.0f ? V{} : v;
    write(out + i, v);
  };
  along(count, [&](int64_t i, int) { apply(Vector{}, i); }, [&](int64_t i) { apply(0.0f, i); });
}

// Mean and (biased) variance of a plane, by deviations from the mean of all.
inline Pair<double> moments(const float* x, int64_t count) {
  double sum = 0, squares = 0;
  plane_sums(count, sum, squares, Deviations{x, x[0]});
  const float mean = static_cast<float>(x[0] + sum / count);
  plane_sums(count, sum, squares, Deviations{x, mean});
  return {mean + sum / count, (squares - sum * sum / count) / count};
}

// Gradients of one channel; `fixed`: mean and variance were given, not taken from the batch.
struct NormGradient {
  float weight, bias;
};
inline NormGradient normalise_backward(const Incoming& in, int64_t count, float inverse, bool fixed, float* dx,
                                       float* dadded) {
  double sum = 0, product = 0;
  plane_sums(count, sum, product, in);
  const float mean = fixed ? 0.0f : static_cast<float>(sum / count);
  const float slope = fixed ? 0.0f : static_cast<float>(product / count) * inverse * inverse;
  const auto apply = [&](auto zero, int64_t i) {
    using V = decltype(zero);
    const V x = read<V>(in.x + i), g = in.template gradient_at<V>(i, x);
    if (dadded) write(dadded + i, g);
    write(dx + i, (g - mean - (x - in.mean) * slope) * in.scale);
  };
  if (dx) along(count, [&](int64_t i, int) { apply(Vector{}, i); }, [&](int64_t i) { apply(0.0f, i); });
  return {static_cast<float>(product) * inverse, static_cast<float>(sum)};
}

}  // namespace
