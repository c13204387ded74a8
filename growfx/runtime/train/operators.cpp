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
#include <torch/library.h>

#include <memory>
#include <optional>
#include <tuple>

#include "autograd.h"
#include "entries.h"
#include "layout.h"
#include "norm_operators.h"
#include "pool.h"
#include "product.h"

namespace {

at::Tensor sparse_product(const at::Tensor& x, const at::Tensor& values, const std::optional<at::Tensor>& bias,
                          const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                          const at::Tensor& back_source, const at::Tensor& back_order, at::IntArrayRef kernel,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          at::IntArrayRef out_sizes, bool panels) {
  const Layer layer{start, source, back_start, back_source, back_order, kernel, stride, padding, dilation};
  const at::Tensor images = with_inner_batch(x);
  at::Tensor out = empty_inner(out_sizes, images.options());
  if (out.numel() == 0) return out;
  const float* const added = bias ? bias->const_data_ptr<float>() : nullptr;
  run_multiply(geometry_of(x.sizes(), out_sizes, layer), layer, false, panels, values.const_data_ptr<float>(),
               {images.const_data_ptr<float>(), added, out.mutable_data_ptr<float>(), plane_stride(images), plane_stride(out)});
  return out;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Gradients sparse_product_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& values,
                                  const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                                  const at::Tensor& back_source, const at::Tensor& back_order, at::IntArrayRef kernel,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  std::array<bool, 3> wanted, bool panels) {
  const Layer layer{start, source, back_start, back_source, back_order, kernel, stride, padding, dilation};
  const Geometry g = geometry_of(x.sizes(), grad.sizes(), layer);
  const at::Tensor gradient = with_inner_batch(grad);
  const float* const dy = gradient.const_data_ptr<float>();
  Gradients found;
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

// A layer as it stands in a network: whatever its weight's and input's layout. `inner`: leave the batch innermost.
at::Tensor sparse_layer(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const at::Tensor& index,
                        const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                        const at::Tensor& back_source, const at::Tensor& back_order, Ints stride, Ints padding,
                        Ints dilation, Ints out_size, bool inner, bool panels) {
  const bool ready = x.scalar_type() == at::kFloat && batch_is_inner(x);
  const ProductArguments a{{start, source, back_start, back_source, back_order},
                           {weight.sizes().slice(2).vec(), stride.vec(), padding.vec(), dilation.vec()}};
  std::vector<int64_t> sizes{x.size(0), weight.size(0)};
  sizes.insert(sizes.end(), out_size.begin(), out_size.end());
  const at::Tensor values = call_gather(weight, index);
  const at::Tensor out = call_product(ready ? x : call_batch_inner(x), values, bias, a, sizes, panels);
  return inner ? out : call_batch_outer(out, x.scalar_type());
}

}  // namespace

#define TABLES "Tensor start, Tensor source, Tensor back_start, Tensor back_source, Tensor back_order"
#define GEOMETRY "int[] kernel, int[] stride, int[] padding, int[] dilation"

TORCH_LIBRARY_FRAGMENT(growfx, library) {
  library.def(
      "index_mask(Tensor mask, int[] weight_strides, int[] stride, int[] dilation, int[] block) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int[] out_size) -> (Tensor, "
      "Tensor)");
  library.def(
      "max_pool_backward(Tensor grad, Tensor which, int[] in_sizes, int[] kernel, int[] stride, int[] padding, int[] "
      "dilation) -> Tensor");
  library.def("put_entries(Tensor(a!) weight, Tensor index, Tensor values) -> ()");
  library.def("has_entries(Tensor mask, Tensor index) -> bool");
  library.def("batch_inner(Tensor x) -> Tensor");
  library.def("batch_outer(Tensor x, ScalarType dtype) -> Tensor");
  library.def(
      "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, Tensor? added, float eps, bool relu) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, Tensor? out, "
      "float eps, bool relu, bool fixed, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("sparse_layer(Tensor x, Tensor weight, Tensor? bias, Tensor index, " TABLES
              ", int[] stride, int[] padding, int[] dilation, int[] out_size, bool inner, bool panels=False) -> Tensor");
  library.def("gather_entries(Tensor weight, Tensor index) -> Tensor");
  library.def("scatter_entries(Tensor values, Tensor index, int[] sizes, int[] strides) -> Tensor");
  library.def("sparse_product(Tensor x, Tensor values, Tensor? bias, " TABLES ", " GEOMETRY ", int[] out_sizes, bool panels=False) -> Tensor");
  library.def("sparse_product_backward(Tensor grad, Tensor x, Tensor values, " TABLES ", " GEOMETRY
              ", bool[3] wanted, bool panels=False) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(growfx, CPU, library) {
  library.impl("has_entries", &has_entries);
  library.impl("index_mask", &index_mask);
  library.impl("batch_inner", &with_inner_batch);
  library.impl("batch_outer", &with_outer_batch);
  library.impl("gather_entries", &gather_entries);
  library.impl("scatter_entries", &scatter_entries);
  library.impl("sparse_product", &sparse_product);
  library.impl("sparse_product_backward", &sparse_product_backward);
  library.impl("norm", &norm);
  library.impl("max_pool", &max_pool);
  library.impl("max_pool_backward", &max_pool_backward);
  library.impl("put_entries", &put_entries);
  library.impl("norm_backward", &norm_backward);
}
TORCH_LIBRARY_IMPL(growfx, Autograd, library) {
  library.impl("batch_inner", [](const at::Tensor& x) { return BatchInner::apply(x); });
  library.impl("batch_outer", [](const at::Tensor& x, at::ScalarType dtype) { return BatchOuter::apply(x, dtype); });
  library.impl("gather_entries",
               [](const at::Tensor& weight, const at::Tensor& index) { return GatherEntries::apply(weight, index); });
  library.impl("scatter_entries", [](const at::Tensor& values, const at::Tensor& index, Ints sizes, Ints strides) {
    return ScatterEntries::apply(values, index, sizes, strides);
  });
  library.impl("sparse_product",
               [](const at::Tensor& x, const at::Tensor& values, const Optional& bias, const at::Tensor& start,
                  const at::Tensor& source, const at::Tensor& back_start, const at::Tensor& back_source,
                  const at::Tensor& back_order, Ints kernel, Ints stride, Ints padding, Ints dilation, Ints out_sizes,
                  bool panels) {
                 return SparseProduct::apply(x, values, bias, start, source, back_start, back_source, back_order,
                                             kernel, stride, padding, dilation, out_sizes, panels);
               });
  library.impl("norm", [](const at::Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                          const Optional& variance, const Optional& added, double eps, bool relu) {
    const variable_list found = Norm::apply(x, weight, bias, mean, variance, added, eps, relu);
    return std::make_tuple(found[0], found[1], found[2]);
  });
  library.impl("max_pool", [](const at::Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation, Ints out) {
    const variable_list found = MaxPool::apply(x, kernel, stride, padding, dilation, out);
    return std::make_tuple(found[0], found[1]);
  });
}
TORCH_LIBRARY_IMPL(growfx, CompositeImplicitAutograd, library) { library.impl("sparse_layer", &sparse_layer); }
