// The operators: their schemas, and what computes them on a CPU.

#include <torch/library.h>

#include "entries.h"
#include "layout.h"
#include "norm_operators.h"
#include "operators.h"
#include "pool.h"

#define TABLES "Tensor start, Tensor source, Tensor back_start, Tensor back_source, Tensor back_order"
#define GEOMETRY "int[] kernel, int[] stride, int[] padding, int[] dilation"

TORCH_LIBRARY_FRAGMENT(growfx, library) {
  library.def(
      "index_mask(Tensor mask, int[] weight_strides, int[] stride, int[] dilation, int[] block, int groups=1) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
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
  library.impl("sparse_product", &growfx::sparse_product);
  library.impl("sparse_product_backward", &growfx::sparse_product_backward);
  library.impl("norm", &norm);
  library.impl("max_pool", &max_pool);
  library.impl("max_pool_backward", &max_pool_backward);
  library.impl("put_entries", &put_entries);
  library.impl("norm_backward", &norm_backward);
}
