// Gradients of the operators. Second derivatives go through torch's dense operators.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "layout.h"
#include "operators.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The operators by their schemas, so that tracers see them.
inline at::Tensor call_batch_inner(const at::Tensor& x) {
  static const auto op = handle<at::Tensor(const at::Tensor&)>("growfx::batch_inner");
  return op.call(x);
}
inline at::Tensor call_batch_outer(const at::Tensor& x, at::ScalarType dtype) {
  static const auto op = handle<at::Tensor(const at::Tensor&, at::ScalarType)>("growfx::batch_outer");
  return op.call(x, dtype);
}
inline at::Tensor call_gather(const at::Tensor& weight, const at::Tensor& index) {
  static const auto op = handle<at::Tensor(const at::Tensor&, const at::Tensor&)>("growfx::gather_entries");
  return op.call(weight, index);
}
inline at::Tensor call_scatter(const at::Tensor& values, const at::Tensor& index, Ints sizes, Ints strides) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, Ints, Ints)>("growfx::scatter_entries");
  return op.call(values, index, sizes, strides);
}

// The same tensor to differentiate by within a backward pass, without the hooks that the model gave its gradient.
inline at::Tensor without_hooks(const at::Tensor& x) { return x.defined() ? at::alias(x) : x; }

struct BatchInner : Function<BatchInner> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->saved_data["dtype"] = x.scalar_type();
    return call_batch_inner(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {call_batch_outer(grads[0], ctx->saved_data["dtype"].toScalarType())};
  }
};

struct BatchOuter : Function<BatchOuter> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::ScalarType dtype) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_batch_outer(x, dtype);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {call_batch_inner(grads[0]), at::Tensor()};
  }
};

struct GatherEntries : Function<GatherEntries> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& weight, const at::Tensor& index) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({index});
    ctx->saved_data["sizes"] = weight.sizes(), ctx->saved_data["strides"] = weight.strides();
    return call_gather(weight, index);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto sizes = ctx->saved_data["sizes"].toIntVector(), strides = ctx->saved_data["strides"].toIntVector();
    return {call_scatter(grads[0], ctx->get_saved_variables()[0], sizes, strides), at::Tensor()};
  }
};

struct ScatterEntries : Function<ScatterEntries> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& values, const at::Tensor& index, Ints sizes,
                            Ints strides) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({index});
    ctx->saved_data["strides"] = strides;
    return call_scatter(values, index, sizes, strides);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto strides = ctx->saved_data["strides"].toIntVector();
    at::Tensor grad = grads[0];
    if (grad.strides() != Ints(strides)) grad = at::empty_strided(grad.sizes(), strides, grad.options()).copy_(grad);
    return {call_gather(grad, ctx->get_saved_variables()[0]), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// The arguments of the two products, in the order of their schemas.
struct ProductArguments {
  std::array<at::Tensor, 5> tables;
  std::array<std::vector<int64_t>, 4> geometry;
};

inline at::Tensor call_product(const at::Tensor& x, const at::Tensor& values, const Optional& bias,
                               const ProductArguments& a, Ints out_sizes, bool panels) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const Optional&, const at::Tensor&,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, Ints, Ints,
                               Ints, Ints, Ints, bool);
  static const auto op = handle<Signature>("growfx::sparse_product");
  const auto& [start, source, back_start, back_source, back_order] = a.tables;
  const auto& [kernel, stride, padding, dilation] = a.geometry;
  return op.call(x, values, bias, start, source, back_start, back_source, back_order, kernel, stride, padding,
                 dilation, out_sizes, panels);
}
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> call_product_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                            const at::Tensor& values,
                                                                            const ProductArguments& a,
                                                                            std::array<bool, 3> wanted, bool panels) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, Ints, Ints, Ints, Ints, std::array<bool, 3>, bool);
  static const auto op = handle<Signature>("growfx::sparse_product_backward");
  const auto& [start, source, back_start, back_source, back_order] = a.tables;
  const auto& [kernel, stride, padding, dilation] = a.geometry;
  return op.call(grad, x, values, start, source, back_start, back_source, back_order, kernel, stride, padding,
                 dilation, wanted, panels);
}

// The same product by torch's operators.
inline at::Tensor dense_product(const at::Tensor& x, const at::Tensor& values, const ProductArguments& a,
                                Ints out_sizes) {
  const auto& [kernel, stride, padding, dilation] = a.geometry;
  const int64_t rows = out_sizes[1], columns = x.size(1);
  const int64_t taps = c10::multiply_integers(kernel);
  at::Tensor index = at::empty({values.numel()}, at::kLong);
  const int32_t* const start = a.tables[0].const_data_ptr<int32_t>();
  const int32_t* const source = a.tables[1].const_data_ptr<int32_t>();
  int64_t* const n = index.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s + 1 < a.tables[0].numel(); ++s)
    for (int64_t k = start[s]; k < start[s + 1]; ++k)
      n[k] = s / taps % rows * columns * taps + source[k];
  std::vector<int64_t> sizes{rows, columns};
  sizes.insert(sizes.end(), kernel.begin(), kernel.end());
  const at::Tensor flat = at::zeros({rows * columns * taps}, values.options()).index_put({index}, values);
  const at::Tensor weight = flat.view(sizes);
  if (kernel.empty()) return x.matmul(weight.t());
  std::vector<int64_t> pads, nothing(kernel.size(), 0);
  for (size_t i = kernel.size(); i-- > 0;) {
    const int64_t reach = (out_sizes[i + 2] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1;
    pads.push_back(padding[i]);
    pads.push_back(std::max<int64_t>(0, reach - x.size(i + 2) - padding[i]));
  }
  const at::Tensor padded = at::constant_pad_nd(x, pads);
  return at::convolution(padded, weight, {}, stride, nothing, dilation, false, nothing, 1);
}

struct SparseProduct : Function<SparseProduct> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& values, const Optional& bias,
                            const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                            const at::Tensor& back_source, const at::Tensor& back_order, Ints kernel, Ints stride,
                            Ints padding, Ints dilation, Ints out_sizes, bool panels) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, values, start, source, back_start, back_source, back_order});
    ctx->saved_data["kernel"] = kernel, ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding, ctx->saved_data["dilation"] = dilation, ctx->saved_data["panels"] = panels;
    ctx->saved_data["wanted"] = std::vector<int64_t>{x.requires_grad(), values.requires_grad(),
                                                     bias.has_value() && bias->requires_grad()};
    const ProductArguments a{{start, source, back_start, back_source, back_order},
                             {kernel.vec(), stride.vec(), padding.vec(), dilation.vec()}};
    return call_product(x, values, bias, a, out_sizes, panels);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &values = saved[1], &grad = grads[0];
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const auto wanted = ints("wanted");
    const ProductArguments a{{saved[2], saved[3], saved[4], saved[5], saved[6]},
                             {ints("kernel"), ints("stride"), ints("padding"), ints("dilation")}};
    variable_list found(14);
    if (!at::GradMode::is_enabled()) {
      std::tie(found[0], found[1], found[2]) =
          call_product_backward(grad, x, values, a, {bool(wanted[0]), bool(wanted[1]), bool(wanted[2])},
                                ctx->saved_data["panels"].toBool());
      return found;
    }
    const std::array<at::Tensor, 2> own{without_hooks(x), without_hooks(values)};
    variable_list inputs;
    for (int i = 0; i < 2; ++i)
      if (wanted[i]) inputs.push_back(own[i]);
    if (!inputs.empty()) {
      variable_list result =
          torch::autograd::grad({dense_product(own[0], own[1], a, grad.sizes())}, inputs, {grad}, true, true);
      for (int i = 1; i >= 0; --i)
        if (wanted[i]) found[i] = result.back(), result.pop_back();
    }
    if (wanted[2]) found[2] = grad.transpose(0, 1).flatten(1).sum(1);
    return found;
  }
};


inline Three call_norm(const at::Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                       const Optional& variance, const Optional& added, double eps, bool relu) {
  using Signature = Three(const at::Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
                          const Optional&, double, bool);
  static const auto op = handle<Signature>("growfx::norm");
  return op.call(x, weight, bias, mean, variance, added, eps, relu);
}
inline Four call_norm_backward(const at::Tensor& grad, const at::Tensor& x, const Optional& weight,
                               const Optional& bias, const at::Tensor& mean, const at::Tensor& variance,
                               const Optional& out, double eps, bool relu, bool fixed, std::array<bool, 4> wanted) {
  using Signature = Four(const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, const at::Tensor&,
                         const at::Tensor&, const Optional&, double, bool, bool, std::array<bool, 4>);
  static const auto op = handle<Signature>("growfx::norm_backward");
  return op.call(grad, x, weight, bias, mean, variance, out, eps, relu, fixed, wanted);
}

struct Norm : Function<Norm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const Optional& weight, const Optional& bias,
                               const Optional& mean, const Optional& variance, const Optional& added, double eps,
                               bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, means, variances] = call_norm(x, weight, bias, mean, variance, added, eps, relu);
    const auto needs = [](const Optional& t) { return t.has_value() && t->requires_grad(); };
    ctx->saved_data["wanted"] = std::vector<int64_t>{x.requires_grad(), needs(weight), needs(bias), needs(added)};
    ctx->saved_data["eps"] = eps, ctx->saved_data["relu"] = relu, ctx->saved_data["fixed"] = mean.has_value();
    const bool masked = added && relu;
    ctx->save_for_backward({x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), means, variances,
                            masked ? out : at::Tensor(), added.value_or(at::Tensor())});
    ctx->mark_non_differentiable({means, variances});
    return {out, means, variances};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto wanted = ctx->saved_data["wanted"].toIntVector();
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool relu = ctx->saved_data["relu"].toBool(), fixed = ctx->saved_data["fixed"].toBool();
    if (at::GradMode::is_enabled()) return again(saved, wanted, grads[0], eps, relu, fixed);
    const auto optional = [](const at::Tensor& t) { return t.defined() ? Optional(t) : Optional(); };
    const auto [dx, dweight, dbias, dadded] = call_norm_backward(
        grads[0], saved[0], optional(saved[1]), optional(saved[2]), saved[3], saved[4], optional(saved[5]), eps, relu,
        fixed, {bool(wanted[0]), bool(wanted[1]), bool(wanted[2]), bool(wanted[3])});
    variable_list found(8);
    if (wanted[0]) found[0] = dx;
    if (wanted[1]) found[1] = dweight;
    if (wanted[2]) found[2] = dbias;
    if (wanted[3]) found[5] = dadded;
    return found;
  }
  // The gradients by torch's operators, to be differentiated.
  static variable_list again(const variable_list& saved, const std::vector<int64_t>& wanted, const at::Tensor& grad,
                             double eps, bool relu, bool fixed) {
    const at::Tensor x = without_hooks(saved[0]), weight = without_hooks(saved[1]);
    const at::Tensor bias = without_hooks(saved[2]), added = without_hooks(saved[6]);
    const at::Tensor mean = fixed ? saved[3] : at::Tensor(), variance = fixed ? saved[4] : at::Tensor();
    at::Tensor out = at::batch_norm(x, weight, bias, mean, variance, !fixed, 0.0, eps, false);
    if (added.defined()) out = out + added;
    if (relu) out = out.relu();
    const std::array<std::pair<int, at::Tensor>, 4> all{{{0, x}, {1, weight}, {2, bias}, {5, added}}};
    variable_list inputs, found(8);
    for (int i = 0; i < 4; ++i)
      if (wanted[i]) inputs.push_back(all[i].second);
    if (inputs.empty()) return found;
    const variable_list result = torch::autograd::grad({out}, inputs, {grad}, true, true, true);
    for (int i = 0, k = 0; i < 4; ++i)
      if (wanted[i]) found[all[i].first] = result[k++];
    return found;
  }
};

struct MaxPool : Function<MaxPool> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, Ints kernel, Ints stride, Ints padding,
                               Ints dilation, Ints out_size) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, Ints, Ints, Ints, Ints, Ints);
    static const auto op = handle<Signature>("growfx::max_pool");
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, which] = op.call(x, kernel, stride, padding, dilation, out_size);
    ctx->save_for_backward({x, which});
    ctx->saved_data["kernel"] = kernel, ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding, ctx->saved_data["dilation"] = dilation;
    ctx->mark_non_differentiable({which});
    return {out, which};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, Ints, Ints, Ints, Ints, Ints);
    static const auto op = handle<Signature>("growfx::max_pool_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto ints = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    const auto kernel = ints("kernel"), stride = ints("stride"), padding = ints("padding"), dilation = ints("dilation");
    variable_list found(6);
    if (at::GradMode::is_enabled()) {
      const at::Tensor x = without_hooks(saved[0]), out = at::max_pool2d(x, kernel, stride, padding, dilation);
      found[0] = torch::autograd::grad({out}, {x}, {grads[0]}, true, true)[0];
    } else {
      found[0] = op.call(grads[0], saved[1], saved[0].sizes(), kernel, stride, padding, dilation);
    }
    return found;
  }
};

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
