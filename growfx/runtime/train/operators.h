// The operators on CPU tensors, as torch's dispatcher calls them; each file of the library is compiled by itself.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

using Optional = std::optional<at::Tensor>;
using Ints = at::IntArrayRef;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

namespace growfx {

at::Tensor sparse_product(const at::Tensor& x, const at::Tensor& values, const Optional& bias, const at::Tensor& start,
                          const at::Tensor& source, const at::Tensor& back_start, const at::Tensor& back_source,
                          const at::Tensor& back_order, Ints kernel, Ints stride, Ints padding, Ints dilation,
                          Ints out_sizes, bool panels);
Three sparse_product_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& values,
                              const at::Tensor& start, const at::Tensor& source, const at::Tensor& back_start,
                              const at::Tensor& back_source, const at::Tensor& back_order, Ints kernel, Ints stride,
                              Ints padding, Ints dilation, std::array<bool, 3> wanted, bool panels);

}  // namespace growfx
