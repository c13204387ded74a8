// Max pooling of images whose batch is innermost.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "geometry.h"
#include "layout.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct Pool {
  int64_t images, in_width, out_height, out_width;
  Axis rows, columns;
};

inline Pool pool_of(at::IntArrayRef in, at::IntArrayRef out, at::IntArrayRef kernel, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto axis = [&](int a) {
    return reading_axis({in[2 + a], out[a], kernel[a], stride[a], padding[a], dilation[a]});
  };
  return {in[0], in[3], out[0], out[1], axis(0), axis(1)};
}

// Calls `use(to, from, tap)` for each tap of each place, `begin(to)` before and `end(to)` after those of a place: offsets
// of the place's values and of those the tap reads.
template <class Begin, class Use, class End>
void for_taps(const Pool& p, const Begin& begin, const Use& use, const End& end) {
  const int64_t width = p.columns.order.size();
  for (int64_t y = 0; y < p.out_height; ++y) {
    const Place& row = p.rows.places[y];
    for (int64_t x = 0; x < p.out_width; ++x) {
      const Place& column = p.columns.places[x];
      const int64_t to = (y * p.out_width + x) * p.images;
      begin(to);
      for (int64_t i = row.first; i < row.end; ++i)
        for (int64_t j = column.first; j < column.end; ++j)
          use(to, ((row.base + p.rows.shift[i]) * p.in_width + column.base + p.columns.shift[j]) * p.images,
              i * width + j);
      end(to);
    }
  }
}

// The largest value of each place's taps, and which tap it was; a NaN is larger than all.
inline void pool_plane(const Pool& p, const float* x, float* out, uint8_t* which) {
  const int64_t whole = p.images / LANES * LANES;
  for_taps(
      p,
      [&](int64_t to) {
        std::fill_n(out + to, p.images, -INFINITY);
        std::fill_n(which + to, p.images, uint8_t(255));
      },
      [&](int64_t to, int64_t from, int64_t tap) {
        for (int64_t n = 0; n < whole; n += LANES) {
          const Vector v = load(x + from + n), best = load(out + to + n);
          const Words larger = (Words)(v > best) | (Words)(v != v);
          store(out + to + n, (Vector)(((Words)v & larger) | ((Words)best & ~larger)));
          LooseBytes* const w = reinterpret_cast<LooseBytes*>(which + to + n);
          const Bytes take = __builtin_convertvector(larger, Bytes);
          *w = (take & uint8_t(tap)) | (~take & *w);
        }
        for (int64_t n = whole; n < p.images; ++n) {
          const float v = x[from + n];
          if (v > out[to + n] || std::isnan(v)) out[to + n] = v, which[to + n] = tap;
        }
      },
      [](int64_t) {});
}

inline void pool_plane_backward(const Pool& p, const float* gradient, const uint8_t* which, float* dx) {
  const int64_t whole = p.images / LANES * LANES;
  for_taps(
      p, [](int64_t) {},
      [&](int64_t to, int64_t from, int64_t tap) {
        for (int64_t n = 0; n < whole; n += LANES) {
          const Bytes here = *reinterpret_cast<const LooseBytes*>(which + to + n);
          const Words chosen = (Words)(__builtin_convertvector(here, Words) == uint32_t(tap));
          const Vector g = (Vector)((Words)load(gradient + to + n) & chosen);
          store(dx + from + n, load(dx + from + n) + g);
        }
        for (int64_t n = whole; n < p.images; ++n)
          if (which[to + n] == tap) dx[from + n] += gradient[to + n];
      },
      [](int64_t) {});
}

// (out, which tap each value came from).
inline std::tuple<at::Tensor, at::Tensor> max_pool(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                                                   at::IntArrayRef padding, at::IntArrayRef dilation,
                                                   at::IntArrayRef out_size) {
  const at::Tensor source = with_inner_batch(x);
  const int64_t channels = x.size(1), count = out_size[0] * out_size[1] * x.size(0);
  const at::Tensor out = empty_inner({x.size(0), channels, out_size[0], out_size[1]}, source.options());
  const at::Tensor which = at::empty({channels, count}, source.options().dtype(at::kByte));
  const Pool p = pool_of(x.sizes(), out_size, kernel, stride, padding, dilation);
  const float* const from = source.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  uint8_t* const taps = which.mutable_data_ptr<uint8_t>();
  const int64_t in_plane = plane_stride(source), out_plane = plane_stride(out);
  at::parallel_for(0, channels, std::max<int64_t>(1, COPY_WORK / count), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) pool_plane(p, from + c * in_plane, to + c * out_plane, taps + c * count);
  });
  return {out, which};
}

inline at::Tensor max_pool_backward(const at::Tensor& grad, const at::Tensor& which, at::IntArrayRef in_sizes,
                                    at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation) {
  const at::Tensor gradient = with_inner_batch(grad);
  const at::Tensor dx = empty_inner(in_sizes, gradient.options());
  const int64_t channels = in_sizes[1], count = which.size(1), values = plane_size(in_sizes);
  const Pool p = pool_of(in_sizes, grad.sizes().slice(2), kernel, stride, padding, dilation);
  const float* const from = gradient.const_data_ptr<float>();
  float* const to = dx.mutable_data_ptr<float>();
  const uint8_t* const taps = which.const_data_ptr<uint8_t>();
  const int64_t in_plane = plane_stride(dx), out_plane = plane_stride(gradient);
  at::parallel_for(0, channels, std::max<int64_t>(1, COPY_WORK / values), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(to + c * in_plane, values, 0.0f);
      pool_plane_backward(p, from + c * out_plane, taps + c * count, to + c * in_plane);
    }
  });
  return dx;
}

}  // namespace
