// Products of convolutions and linear layers with an unstructured-sparse weight, for training on a CPU: forward,
// gradient of the input, gradient of the weight at its active entries.
//
// Activations lie with the batch innermost (channel, depth, height, width, image), so that an entry of the weight adds
//     value * source[offset + i]
// to all images i of a place, whatever the place: contiguous loads and one constant offset an entry. Every destination
// value is written by one thread, by sums in an order that shapes and masks alone decide.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "layout.h"
#include "operators.h"
#include "product.h"

at::Tensor growfx::sparse_product(const at::Tensor& x, const at::Tensor& values, const Optional& bias,
                          const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                          const at::Tensor& back_source, const at::Tensor& back_order, Ints kernel,
                          Ints stride, Ints padding, Ints dilation,
                          Ints out_sizes, bool panels) {
  const Layer layer{start, source, back_start, back_source, back_order, kernel, stride, padding, dilation};
  const at::Tensor images = with_inner_batch(x);
  at::Tensor out = empty_inner(out_sizes, images.options());
  if (out.numel() == 0) return out;
  const float* const added = bias ? bias->const_data_ptr<float>() : nullptr;
  run_multiply(geometry_of(x.sizes(), out_sizes, layer), layer, false, panels, values.const_data_ptr<float>(),
               {images.const_data_ptr<float>(), added, out.mutable_data_ptr<float>(), plane_stride(images), plane_stride(out)});
  return out;
}

Three growfx::sparse_product_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& values,
                                  const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                                  const at::Tensor& back_source, const at::Tensor& back_order, Ints kernel,
                                  Ints stride, Ints padding, Ints dilation,
                                  std::array<bool, 3> wanted, bool panels) {
  const Layer layer{start, source, back_start, back_source, back_order, kernel, stride, padding, dilation};
  const Geometry g = geometry_of(x.sizes(), grad.sizes(), layer);
  const at::Tensor gradient = with_inner_batch(grad);
  const float* const dy = gradient.const_data_ptr<float>();
  Three found;
  auto& [dx, dvalues, dbias] = found;
  const int64_t nnz = values.numel(), count = g.out_places() * g.images;
  if (wanted[0]) {
    dx = empty_inner(x.sizes(), gradient.options());
    if (dx.numel())
      run_multiply(g, layer, true, panels, values.const_data_ptr<float>(),
                   {dy, nullptr, dx.mutable_data_ptr<float>(), plane_stride(gradient), plane_stride(dx)});
  }
  if (wanted[1]) {
    dvalues = at::zeros({nnz}, values.options());
    const at::Tensor images = with_inner_batch(x);
    if (count)
      run_correlate(g, layer, panels, images.const_data_ptr<float>(), plane_stride(images), dy, plane_stride(gradient),
                    dvalues.mutable_data_ptr<float>());
  }
  if (wanted[2]) {
    dbias = at::empty({g.out_channels}, values.options());
    float* const b = dbias.mutable_data_ptr<float>();
    at::parallel_for(0, g.out_channels, std::max<int64_t>(1, COPY_WORK / std::max<int64_t>(count, 1)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t o = begin; o < end; ++o) b[o] = plane_total(dy + o * plane_stride(gradient), count);
                     });
  }
  return found;
}
