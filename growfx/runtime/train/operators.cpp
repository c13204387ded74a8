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
#include "products.h"

namespace {

constexpr int64_t THREAD_WORK = 60000;  // register updates over TILE that are worth a thread of their own

// Sizes of a convolution in three axes; those that a tensor does not have are 1.
struct Geometry {
  int64_t images, channels, out_channels, taps;
  Sizes axes;
  int64_t in_places() const { return axes[0].in * axes[1].in * axes[2].in; }
  int64_t out_places() const { return axes[0].out * axes[1].out * axes[2].out; }
};

// What a call is told of its layer.
struct Layer {
  const at::Tensor &start, &channel, &back_start, &back_channel, &back_order;
  at::IntArrayRef kernel, stride, padding, dilation;
};

// Whether every place of the output reads the same place of the input, and no other.
bool is_pointwise(const Geometry& g) {
  for (const AxisSizes& a : g.axes)
    if (a.kernel != 1 || a.stride != 1 || a.padding != 0 || a.in != a.out) return false;
  return true;
}

Geometry geometry_of(at::IntArrayRef in, at::IntArrayRef out, const Layer& layer) {
  Geometry g{in[0], in[1], out[1], 1, {}};
  for (int a = 0; a < 3; ++a) {
    g.axes[a] = {axis_of(in.slice(2), a, 1),      axis_of(out.slice(2), a, 1),      axis_of(layer.kernel, a, 1),
                 axis_of(layer.stride, a, 1), axis_of(layer.padding, a, 0), axis_of(layer.dilation, a, 1)};
    g.taps *= g.axes[a].kernel;
  }
  if (is_pointwise(g)) {  // places are like images: one long run
    g.images *= g.in_places();
    for (AxisSizes& axis : g.axes) axis.in = axis.out = 1;
  }
  return g;
}

struct Product {
  Entries entries;
  std::unique_ptr<int32_t[]> offset;
  std::unique_ptr<float[]> value;
  std::vector<Group> groups;
  int64_t plane;  // values of a destination plane
};

// `backwards`: rows are input channels, the source is the gradient of the output.
// `from_plane`, `to_plane`: values from one plane of source and destination to the next.
Product make_product(const Geometry& g, const Layer& layer, bool backwards, int64_t from_plane, int64_t to_plane) {
  Product p;
  Axes axes;
  for (int a = 0; a < 3; ++a) axes[a] = backwards ? writing_axis(g.axes[a]) : reading_axis(g.axes[a]);
  const auto from = [&](int a) { return backwards ? g.axes[a].out : g.axes[a].in; };
  const int64_t inner = g.images;
  p.plane = to_plane;
  p.groups = groups_of(axes, from(1), from(2), inner, inner % (2 * LANES) != 0);
  const std::vector<int64_t> shifts = tap_shifts(axes, from(1), from(2), inner);
  const int64_t rows = backwards ? g.channels : g.out_channels, taps = g.taps;
  const at::Tensor& starts = backwards ? layer.back_start : layer.start;
  const int32_t* const start = starts.const_data_ptr<int32_t>();
  const int64_t blocks = (starts.numel() - 1) / (rows * taps);
  const at::Tensor& list = backwards ? layer.back_channel : layer.channel;
  const int32_t* const channel = list.const_data_ptr<int32_t>();
  p.offset.reset(new int32_t[list.numel()]);
  at::parallel_for(0, blocks * rows, std::max<int64_t>(1, 16384 / taps), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = start[r * taps + t]; k < start[r * taps + t + 1]; ++k)
          p.offset[k] = channel[k] * from_plane + shifts[t];
  });
  p.entries = {blocks, rows, taps, start, p.offset.get(), nullptr};
  return p;
}

void run_multiply(const Product& p, const float* source, const float* bias, float* out) {
  const std::vector<Tile> tiles = tiles_of(p.groups, TILE, LANES);
  const int64_t segments = p.entries.blocks * p.entries.rows;
  const int64_t cost = p.entries.start[segments * p.entries.taps] + 4 * segments;
  at::parallel_for(0, tiles.size(), std::max<int64_t>(1, THREAD_WORK / cost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = tiles[i];
      const Group& group = p.groups[tile.group];
      const Run* const runs = group.runs.data() + tile.first;
      if (group.length < LANES) {
        multiply_short(p.entries, group, runs, tile.runs, source, out, p.plane, bias);
        continue;
      }
      dispatch<TILE>(tile, [&](auto count, auto registers) {
        multiply<count(), registers()>(p.entries, group.ranges, runs, tile.at, source, out, p.plane, bias);
      });
    }
  });
}

void run_correlate(const Product& p, const float* source, const float* gradient, float* result) {
  const std::vector<Tile> tiles = tiles_of(p.groups, HELD, LANES);
  const int64_t rows = p.entries.rows, taps = p.entries.taps, shares = std::min<int64_t>(at::get_num_threads(), rows);
  const int32_t* const start = p.entries.start;
  std::vector<int64_t> work(rows + 1, 0);  // before each row
  for (int64_t row = 0; row < rows; ++row) {
    work[row + 1] = work[row] + 1;
    for (int64_t b = 0; b < p.entries.blocks; ++b) {
      const int32_t* const here = start + (b * rows + row) * taps;
      work[row + 1] += here[taps] - here[0];
    }
  }
  const auto row_at = [&](int64_t share) {  // equal by entries
    return std::lower_bound(work.begin(), work.end(), work[rows] * share / shares) - work.begin();
  };
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row_at(begin), last = row_at(end);
    for (const Tile& tile : tiles) {
      const Group& group = p.groups[tile.group];
      const Run* const runs = group.runs.data() + tile.first;
      if (group.length < LANES) {
        correlate_short(p.entries, group, runs, tile.runs, source, gradient, p.plane, first, last, result);
        continue;
      }
      dispatch<HELD>(tile, [&](auto count, auto registers) {
        correlate<count(), registers()>(p.entries, group.ranges, runs, tile.at, tile.doubled, source, gradient, p.plane,
                                        first, last, result);
      });
    }
  });
}

at::Tensor sparse_product(const at::Tensor& x, const at::Tensor& values, const std::optional<at::Tensor>& bias,
                          const at::Tensor& start, const at::Tensor& channel, const at::Tensor& back_start,
                          const at::Tensor& back_channel, const at::Tensor& back_order, at::IntArrayRef kernel,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          at::IntArrayRef out_sizes) {
  const Layer layer{start, channel, back_start, back_channel, back_order, kernel, stride, padding, dilation};
  const at::Tensor source = with_inner_batch(x);
  at::Tensor out = empty_inner(out_sizes, source.options());
  if (out.numel() == 0) return out;
  Product p = make_product(geometry_of(x.sizes(), out_sizes, layer), layer, false, plane_stride(source), plane_stride(out));
  p.entries.value = values.const_data_ptr<float>();
  const float* const added = bias ? bias->const_data_ptr<float>() : nullptr;
  run_multiply(p, source.const_data_ptr<float>(), added, out.mutable_data_ptr<float>());
  return out;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Gradients sparse_product_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& values,
                                  const at::Tensor& start, const at::Tensor& channel, const at::Tensor& back_start,
                                  const at::Tensor& back_channel, const at::Tensor& back_order, at::IntArrayRef kernel,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  std::array<bool, 3> wanted) {
  const Layer layer{start, channel, back_start, back_channel, back_order, kernel, stride, padding, dilation};
  const Geometry g = geometry_of(x.sizes(), grad.sizes(), layer);
  const at::Tensor gradient = with_inner_batch(grad);
  const float* const dy = gradient.const_data_ptr<float>();
  Gradients found;
  auto& [dx, dvalues, dbias] = found;
  const int64_t nnz = values.numel(), count = g.out_places() * g.images;
  if (wanted[0]) {
    dx = empty_inner(x.sizes(), gradient.options());
    Product p = make_product(g, layer, true, plane_stride(gradient), plane_stride(dx));
    p.value.reset(new float[nnz]);
    const float* const v = values.const_data_ptr<float>();
    const int32_t* const order = back_order.const_data_ptr<int32_t>();
    for (int64_t k = 0; k < nnz; ++k) p.value[k] = v[order[k]];
    p.entries.value = p.value.get();
    if (dx.numel()) run_multiply(p, dy, nullptr, dx.mutable_data_ptr<float>());
  }
  if (wanted[1]) {
    dvalues = at::zeros({nnz}, values.options());
    const at::Tensor source = with_inner_batch(x);
    if (count)
      run_correlate(make_product(g, layer, false, plane_stride(source), plane_stride(gradient)), source.const_data_ptr<float>(), dy,
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
                        const at::Tensor& start, const at::Tensor& channel, const at::Tensor& back_start,
                        const at::Tensor& back_channel, const at::Tensor& back_order, Ints stride, Ints padding,
                        Ints dilation, Ints out_size, bool inner) {
  const bool ready = x.scalar_type() == at::kFloat && batch_is_inner(x);
  const ProductArguments a{{start, channel, back_start, back_channel, back_order},
                           {weight.sizes().slice(2).vec(), stride.vec(), padding.vec(), dilation.vec()}};
  std::vector<int64_t> sizes{x.size(0), weight.size(0)};
  sizes.insert(sizes.end(), out_size.begin(), out_size.end());
  const at::Tensor values = call_gather(weight, index);
  const at::Tensor out = call_product(ready ? x : call_batch_inner(x), values, bias, a, sizes);
  return inner ? out : call_batch_outer(out, x.scalar_type());
}

}  // namespace

#define TABLES "Tensor start, Tensor channel, Tensor back_start, Tensor back_channel, Tensor back_order"
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
              ", int[] stride, int[] padding, int[] dilation, int[] out_size, bool inner) -> Tensor");
  library.def("gather_entries(Tensor weight, Tensor index) -> Tensor");
  library.def("scatter_entries(Tensor values, Tensor index, int[] sizes, int[] strides) -> Tensor");
  library.def("sparse_product(Tensor x, Tensor values, Tensor? bias, " TABLES ", " GEOMETRY ", int[] out_sizes) -> Tensor");
  library.def("sparse_product_backward(Tensor grad, Tensor x, Tensor values, " TABLES ", " GEOMETRY
              ", bool[3] wanted) -> (Tensor, Tensor, Tensor)");
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
                  const at::Tensor& channel, const at::Tensor& back_start, const at::Tensor& back_channel,
                  const at::Tensor& back_order, Ints kernel, Ints stride, Ints padding, Ints dilation, Ints out_sizes) {
                 return SparseProduct::apply(x, values, bias, start, channel, back_start, back_channel, back_order,
                                             kernel, stride, padding, dilation, out_sizes);
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
