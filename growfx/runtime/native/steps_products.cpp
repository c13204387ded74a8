// Convolutions, linear layers, matrix products and attention.

#include <algorithm>
#include <cstring>

#include "steps.h"
#include "weights.h"

namespace growfx_native {

namespace {

// Floats of the planes of one band: they stay in the second cache.
constexpr int64_t BAND_FLOATS = int64_t{96} << 10;
// Output positions below which images of a batch lie side by side, and how many positions they then have.
constexpr int64_t FOLD_BELOW = 64, FOLDED = 192;
constexpr int64_t LARGEST = INT32_MAX / 2;

int64_t whole(int64_t count, int64_t lanes) { return ceil_div(count, lanes) * lanes; }

// Shares for an even spread over the threads.
int64_t shares_of(int64_t units, int threads) {
  return units % threads == 0 || units >= 4 * threads ? 1 : threads;
}

bool bias_fits(const Arguments& a, int64_t channels) {
  return a.inputs.size() < 3 || (a.inputs[2].data && a.inputs[2].elements == channels);
}
const float* bias_of(const Arguments& a) { return a.inputs.size() < 3 ? nullptr : a.inputs[2].data; }

// -- convolution ------------------------------------------------------------------------------------------------------

const char* read_geometry(const Arguments& a, Geometry& g) {
  const auto& ints = a.step->ints;
  const int64_t axes = ints.empty() ? 0 : ints[0];
  if (axes < 1 || axes > 3 || ints.size() != static_cast<size_t>(3 * axes + 2)) return "an impossible geometry";
  const Sizes &x = a.inputs[0].sizes, &w = a.inputs[1].sizes, &y = a.output.sizes;
  const size_t rank = static_cast<size_t>(axes) + 2;
  if (x.size() != rank || w.size() != rank || y.size() != rank) return "operands of the wrong number of axes";
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t to = 3 - axes + i;
    g.in[to] = x[i + 2], g.out[to] = y[i + 2], g.window[to] = w[i + 2];
    g.stride[to] = ints[1 + i], g.padding[to] = ints[1 + axes + i], g.dilation[to] = ints[1 + 2 * axes + i];
    const bool fits = g.stride[to] >= 1 && g.stride[to] <= LARGEST && g.padding[to] >= 0 && g.padding[to] <= LARGEST &&
                      g.dilation[to] >= 1 && g.dilation[to] <= LARGEST && g.window[to] <= LARGEST;
    if (!fits || g.window[to] < 1) return "an impossible geometry";
  }
  g.groups = ints[3 * static_cast<size_t>(axes) + 1];
  return g.groups >= 1 ? "" : "an impossible number of groups";
}

bool is_pointwise(const Geometry& g) {
  bool plain = g.out[0] == 1;
  for (int i = 0; i < 3; ++i) plain = plain && g.window[i] == 1 && g.stride[i] == 1 && g.padding[i] == 0;
  return plain;
}

class ConvolutionStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->convolution(c, task, scratch); }

  Convolution c{};
  const Kernels* kernels = nullptr;
  Weight weight;
  std::vector<Blocks> blocks;
  std::vector<Rows> rows;
  std::vector<int32_t> group_start, planes, entry_channel;
  std::vector<PostCall> post;

  // The planes that have an entry, and of each entry or column its plane.
  std::vector<int32_t> find_planes(const Constant& constant, const Geometry& g) {
    const int64_t per_group = c.channels / g.groups, rows = c.out_channels / g.groups;
    const int64_t kd = g.window[0], kh = g.window[1], kw = g.window[2], pairs = per_group * kd * kw;
    const auto pair_of = [&](int64_t column) {  // (channel, kd, kh, kw) without kh
      return column / (kh * kw) * kw + column % kw;
    };
    group_start.assign(1, 0);
    std::vector<int32_t> number(static_cast<size_t>(pairs)), plane_of;
    size_t entry = 0;
    for (int64_t group = 0; group < g.groups; ++group) {
      std::fill(number.begin(), number.end(), constant.sparse ? 0 : 1);
      const size_t first = entry;
      for (; constant.sparse && entry < constant.positions.size(); ++entry) {
        const int64_t position = constant.positions[entry];
        if (position / weight.columns >= (group + 1) * rows) break;
        number[static_cast<size_t>(pair_of(position % weight.columns))] = 1;
      }
      int32_t count = 0;
      for (int64_t p = 0; p < pairs; ++p) {
        if (!number[static_cast<size_t>(p)]) continue;
        number[static_cast<size_t>(p)] = count++;
        planes.push_back(static_cast<int32_t>(group * per_group + p / (kd * kw)));
        planes.push_back(static_cast<int32_t>(p / kw % kd));
        planes.push_back(static_cast<int32_t>(p % kw));
      }
      group_start.push_back(group_start.back() + count);
      c.most_planes = std::max<int64_t>(c.most_planes, count);
      for (size_t i = first; i < entry; ++i)
        plane_of.push_back(number[static_cast<size_t>(pair_of(constant.positions[i] % weight.columns))]);
      if (!constant.sparse && group == 0)
        for (int64_t column = 0; column < weight.columns; ++column)
          plane_of.push_back(number[static_cast<size_t>(pair_of(column))]);
    }
    return plane_of;
  }

  // How images are laid out and shared.
  bool lay_out(const Geometry& g, int threads) {
    const int64_t positions = c.out_height * c.out_width, reach = (g.window[1] - 1) * g.dilation[1];
    const bool pointwise = is_pointwise(g);
    if (pointwise) {  // an image is one long row
      c.height = c.out_height = 1;
      c.width = c.out_width = positions;
    }
    c.phases = std::min(g.stride[1], reach + 1);
    c.reach = reach / g.stride[1];
    c.block = 1;
    if (positions < FOLD_BELOW && c.images > 1) {
      const int64_t units = std::max<int64_t>(ceil_div(c.images * positions, FOLDED), 1);
      c.block = ceil_div(c.images, units);
    }
    c.direct = pointwise && c.block == 1;
    c.band = c.out_height;
    if (!c.direct && c.block == 1) {
      const int64_t row = std::max<int64_t>(c.most_planes * c.phases * c.out_width, 1);
      const int64_t least = std::min(c.out_height, ceil_div(4 * kernels->lanes, c.out_width));
      c.band = std::clamp(BAND_FLOATS / row - c.reach, least, c.out_height);
      c.band = ceil_div(c.out_height, ceil_div(c.out_height, c.band));
      // Threads that share a band copy its planes each; bands for all of them are better where their rows are many. A
      // last band of few rows is added up in another order, and results would depend on the number of threads.
      const int64_t units = c.images * ceil_div(c.out_height, c.band), even = ceil_div(units, threads) * threads;
      const int64_t band = ceil_div(c.out_height, ceil_div(even, c.images));
      const auto evenly = [&](int64_t rows) { return (c.out_height - 1) % rows + 1 >= least; };
      if (shares_of(units, threads) > 1 && band >= std::max(least, 4 * c.reach) && evenly(band) && evenly(c.band))
        c.band = band;
    }
    // Room for a register past the end, and no half page: planes would share cache lines.
    c.plane_size = c.direct ? positions
                            : whole((c.band + c.reach) * c.phases * c.block * c.out_width + kernels->lanes, 16);
    if (!c.direct && c.plane_size % 512 == 0) c.plane_size += 16;
    const int64_t units = ceil_div(c.images, c.block) * ceil_div(c.out_height, c.band);
    c.shares = shares_of(units, threads);
    weight.share(c.shares);
    return c.reach <= LARGEST && c.plane_size <= LARGEST / std::max<int64_t>(c.most_planes, 1);
  }

  // Where the column of each entry is.
  void find_offsets(const Constant& constant, const Geometry& g, const std::vector<int32_t>& plane_of) {
    const int64_t row = c.block * c.out_width, kh = g.window[1], kw = g.window[2];
    weight.offset.resize(plane_of.size());
    for (size_t i = 0; i < plane_of.size(); ++i) {
      const int64_t column = constant.sparse ? constant.positions[i] % weight.columns : static_cast<int64_t>(i);
      const int64_t reach = column / kw % kh * g.dilation[1];
      const int64_t at = reach % c.stride_h * (c.band + c.reach) + reach / c.stride_h;
      const int64_t plane = c.direct ? column : plane_of[i];
      weight.offset[i] = static_cast<int32_t>(plane * c.plane_size + (c.direct ? 0 : at * row));
    }
  }

  // The channel that each entry reads, of a pointwise convolution, and how many entries a group has at most.
  void find_channels(const Constant& constant) {
    const int64_t per_group = c.out_channels / c.groups;
    for (const uint32_t p : constant.positions) entry_channel.push_back(static_cast<int32_t>(p % weight.columns));
    for (int64_t group = 0; group < c.groups; ++group) {
      int64_t entries = 0;
      for (int64_t o = group * per_group; o < (group + 1) * per_group; ++o) entries += weight.entries(o);
      c.most_entries = std::max(c.most_entries, entries);
    }
    c.entry_channel = entry_channel.data();
  }

  // The rows of each group, in blocks where there are positions enough; the columns of groups may be elsewhere.
  void find_rows(const Constant& constant, const float* bias) {
    const int64_t per_group = c.out_channels / c.groups, tile = kernels->tile;
    const Rows whole = weight.view(constant, bias);
    const bool is_wide = c.band * c.out_width * c.block >= 2 * kernels->lanes;
    blocks.resize(static_cast<size_t>(c.groups));
    std::vector<int32_t> offset_of(static_cast<size_t>(weight.columns)), column_of;
    for (const uint32_t p : constant.positions) column_of.push_back(static_cast<int32_t>(p % weight.columns));
    for (int64_t group = 0; group < c.groups; ++group) {
      Blocks& made = blocks[static_cast<size_t>(group)];
      const int64_t first = group * per_group;
      if (is_wide && !constant.sparse) {
        made.build_dense(weight.offset, per_group, tile);
      } else if (is_wide) {
        for (size_t i = weight.start[static_cast<size_t>(first)]; i < weight.start[static_cast<size_t>(first + per_group)]; ++i)
          offset_of[static_cast<size_t>(column_of[i])] = weight.offset[i];
        made.build_sparse(weight, constant, first, per_group, column_of, offset_of, tile);
      }
      rows.push_back(made.view(whole, first, per_group, tile));
    }
    c.rows = rows.data();
  }
};

}  // namespace

namespace {

// `gate`: a factor of each channel of each image, NULL for none.
Made build_convolution(const Arguments& a, const Tensor* gate, std::string& complaint) {
  if (!a.has(2, 3, 5) || !a.inputs[1].constant) return refused(complaint, "expected an input and a constant weight");
  Geometry g;
  const char* problem = read_geometry(a, g);
  if (*problem) return refused(complaint, problem);
  const Tensor &x = a.inputs[0], &w = a.inputs[1], &y = a.output;
  const int64_t channels = x.sizes[1], outputs = w.sizes[0];
  if (!x.data || x.sizes[0] != y.sizes[0] || y.sizes[1] != outputs || channels % g.groups || outputs % g.groups ||
      w.sizes[1] != channels / g.groups || !bias_fits(a, outputs))
    return refused(complaint, "shapes that do not fit its weight");
  for (int i = 0; i < 3; ++i) {
    const int64_t room = g.in[i] + 2 * g.padding[i] - g.dilation[i] * (g.window[i] - 1) - 1;
    if (room < 0 || room / g.stride[i] + 1 != g.out[i]) return refused(complaint, "an output of the wrong size");
  }
  if (gate && !(is_pointwise(g) && gate->data && gate->elements == x.sizes[0] * channels))
    return refused(complaint, "a gate that does not fit");
  if (!gate && is_flat(g) && g.groups > 1 && w.sizes[1] == 1) return make_depthwise(a, g, complaint);
  auto step = std::make_unique<ConvolutionStep>();
  Convolution& c = step->c;
  c.images = x.sizes[0] * g.out[0];
  c.channels = channels, c.depth = g.in[0], c.height = g.in[1], c.width = g.in[2];
  c.out_channels = outputs, c.out_depth = g.out[0], c.out_height = g.out[1], c.out_width = g.out[2];
  c.stride_d = g.stride[0], c.stride_h = g.stride[1], c.stride_w = g.stride[2];
  c.padding_d = g.padding[0], c.padding_h = g.padding[1], c.padding_w = g.padding[2];
  c.dilation_d = g.dilation[0], c.dilation_w = g.dilation[2], c.groups = g.groups;
  step->kernels = a.kernels;
  step->weight.pack(*w.constant, outputs);
  const std::vector<int32_t> plane_of = step->find_planes(*w.constant, g);
  if (!step->lay_out(g, a.threads)) return refused(complaint, "an image that is too large");
  step->find_offsets(*w.constant, g, plane_of);
  step->find_rows(*w.constant, bias_of(a));
  step->post = a.post;
  c.group_start = step->group_start.data(), c.planes = step->planes.data();
  c.share_start = step->weight.share_start.data();
  c.x = x.data, c.out = y.data;
  if (gate) {
    c.gate = gate->data;
    step->find_channels(*w.constant);
  }
  c.post = step->post.data(), c.post_count = static_cast<int64_t>(step->post.size());
  step->does_post = true;
  step->tasks = a.kernels->convolution_tasks(c);
  step->scratch = a.kernels->convolution_scratch(c);
  return step;
}

}  // namespace

Made make_convolution(const Arguments& a, std::string& complaint) { return build_convolution(a, nullptr, complaint); }

// The gate is the third input.
Made make_gated_convolution(const Arguments& a, std::string& complaint) {
  if (!a.has(3, 4, 5)) return refused(complaint, "expected an input, a weight and a gate");
  Arguments plain = a;
  const Tensor gate = a.inputs[2];
  plain.inputs.erase(plain.inputs.begin() + 2);
  return build_convolution(plain, &gate, complaint);
}

// -- linear -----------------------------------------------------------------------------------------------------------

namespace {

class LinearStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->linear(c, task, scratch); }

  Linear c{};
  const Kernels* kernels = nullptr;
  Weight weight;
  Blocks blocks;
  std::vector<PostCall> post;
};

// Rows at a time: their inputs and outputs stay in the second cache.
int64_t row_block(int64_t count, int64_t inputs, int64_t outputs, int64_t lanes) {
  const int64_t widest = 8 * lanes;
  const int64_t fits = std::max(BAND_FLOATS * 2 / (inputs + outputs) / lanes * lanes, 2 * lanes);
  const int64_t block = std::min({count, widest, fits});
  return ceil_div(count, ceil_div(count, block));
}

}  // namespace

Made make_linear(const Arguments& a, std::string& complaint) {
  if (!a.has(2, 3, 0) || !a.inputs[1].constant) return refused(complaint, "expected an input and a constant weight");
  const Tensor &x = a.inputs[0], &w = a.inputs[1], &y = a.output;
  if (!x.data || w.rank() != 2 || x.rank() < 1 || y.rank() != x.rank())
    return refused(complaint, "operands of the wrong number of axes");
  const int64_t outputs = w.sizes[0], inputs = w.sizes[1], count = x.elements / x.sizes.back();
  if (x.sizes.back() != inputs || y.sizes.back() != outputs || y.elements / outputs != count || !bias_fits(a, outputs))
    return refused(complaint, "shapes that do not fit its weight");
  auto step = std::make_unique<LinearStep>();
  Linear& c = step->c;
  const int64_t lanes = a.kernels->lanes;
  c.count = count, c.inputs = inputs, c.outputs = outputs;
  c.block = row_block(count, inputs, outputs, lanes);
  if (inputs > LARGEST / whole(c.block, lanes)) return refused(complaint, "rows that are too long");
  c.shares = shares_of(ceil_div(count, c.block), a.threads);
  Weight& weight = step->weight;
  weight.pack(*w.constant, outputs);
  weight.share(c.shares);
  const int64_t row = c.block < lanes / 2 ? 1 : whole(c.block, lanes);
  if (w.constant->sparse)
    for (const uint32_t p : w.constant->positions)
      weight.offset.push_back(static_cast<int32_t>(static_cast<int64_t>(p) % inputs * row));
  else
    for (int64_t i = 0; i < inputs; ++i) weight.offset.push_back(static_cast<int32_t>(i * row));
  step->kernels = a.kernels;
  step->post = a.post;
  c.share_start = weight.share_start.data();
  c.rows = weight.view(*w.constant, bias_of(a));
  if (w.constant->sparse && row >= 2 * lanes) {
    step->blocks.build_placed(weight, *w.constant, row);
    c.rows = step->blocks.view(c.rows, 0, outputs, a.kernels->tile);
  }
  c.x = x.data, c.out = y.data;
  c.post = step->post.data(), c.post_count = static_cast<int64_t>(step->post.size());
  step->does_post = true;
  step->tasks = a.kernels->linear_tasks(c);
  step->scratch = a.kernels->linear_scratch(c);
  return step;
}

// -- products of values -----------------------------------------------------------------------------------------------

namespace {

class ProductStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->product(c, task, scratch); }
  Product c{};
  const Kernels* kernels = nullptr;
};

class AttentionStep final : public Ready {
 public:
  void run(int64_t task, float* scratch) const override { kernels->attention(c, task, scratch); }
  Attention c{};
  const Kernels* kernels = nullptr;
  std::vector<int64_t> mask_offset;
};

// Where the mask of each head begins; false where it does not broadcast.
bool find_masks(const Sizes& mask, const Sizes& heads, std::vector<int64_t>& offsets) {
  const size_t axes = heads.size() - 2, given = mask.size();
  if (given < 2 || given > heads.size()) return false;
  int64_t total = 1;
  for (size_t i = 0; i < axes; ++i) total *= heads[i];
  for (int64_t head = 0; head < total; ++head) {
    int64_t rest = head, offset = 0, step = mask[given - 1] * mask[given - 2];
    for (size_t back = 0; back < axes; ++back) {
      const int64_t size = heads[axes - 1 - back], index = rest % size;
      rest /= size;
      if (back + 2 >= given) continue;
      const int64_t has = mask[given - 3 - back];
      if (has != 1 && has != size) return false;
      if (has != 1) offset += index * step;
      step *= has;
    }
    offsets.push_back(offset);
  }
  return true;
}

}  // namespace

// ints: whether the first and the second matrix are stored the other way round.
Made make_product(const Arguments& a, std::string& complaint) {
  if (!a.has(2, 2, 2)) return refused(complaint, "expected two matrices");
  const Tensor &x = a.inputs[0], &w = a.inputs[1], &y = a.output;
  if (!x.data || !w.data || x.rank() < 2 || x.rank() != w.rank() || x.rank() != y.rank())
    return refused(complaint, "operands of the wrong number of axes");
  const bool x_turned = a.step->ints[0] != 0, w_turned = a.step->ints[1] != 0;
  const size_t r = x.sizes.size() - 2;
  auto step = std::make_unique<ProductStep>();
  Product& c = step->c;
  c.m = x.sizes[r + x_turned], c.k = x.sizes[r + !x_turned], c.n = w.sizes[r + !w_turned];
  c.batch = x.elements / (c.m * c.k);
  bool same = w.sizes[r + w_turned] == c.k && y.sizes[r] == c.m && y.sizes[r + 1] == c.n;
  for (size_t i = 0; i < r; ++i) same = same && x.sizes[i] == w.sizes[i] && x.sizes[i] == y.sizes[i];
  if (!same || c.k > LARGEST / whole(c.n, 16)) return refused(complaint, "matrices that do not fit");
  c.a_batch = c.m * c.k, c.a_row = x_turned ? 1 : c.k, c.a_column = x_turned ? c.m : 1;
  c.c_batch = c.k * c.n, c.c_transposed = w_turned, c.scale = a.real(0, 1.0f);
  c.a = x.data, c.c = w.data, c.out = y.data;
  step->kernels = a.kernels;
  step->tasks = c.batch;
  step->scratch = a.kernels->product_scratch(c);
  return step;
}

// ints: causal; floats: the scale.
Made make_attention(const Arguments& a, std::string& complaint) {
  if (!a.has(3, 4, 1)) return refused(complaint, "expected queries, keys, values and a mask or none");
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  for (const Tensor& t : a.inputs)
    if (!t.data) return refused(complaint, "a sparse operand");
  if (q.rank() < 2 || k.rank() != q.rank() || v.rank() != q.rank() || a.output.rank() != q.rank())
    return refused(complaint, "operands of the wrong number of axes");
  const size_t r = q.sizes.size() - 2;
  auto step = std::make_unique<AttentionStep>();
  Attention& c = step->c;
  c.queries = q.sizes[r], c.keys = k.sizes[r], c.depth = q.sizes[r + 1], c.value_depth = v.sizes[r + 1];
  c.batch = q.elements / (c.queries * c.depth);
  bool same = k.sizes[r + 1] == c.depth && v.sizes[r] == c.keys && a.output.sizes[r] == c.queries &&
              a.output.sizes[r + 1] == c.value_depth;
  for (size_t i = 0; i < r; ++i)
    same = same && q.sizes[i] == k.sizes[i] && q.sizes[i] == v.sizes[i] && q.sizes[i] == a.output.sizes[i];
  if (!same || c.keys > LARGEST / whole(std::max(c.depth, c.value_depth), 16))
    return refused(complaint, "matrices that do not fit");
  if (a.inputs.size() == 4) {
    const Sizes& mask = a.inputs[3].sizes;
    if (!find_masks(mask, q.sizes, step->mask_offset) || mask[mask.size() - 1] != c.keys ||
        mask[mask.size() - 2] != c.queries)
      return refused(complaint, "a mask that does not fit");
    c.mask = a.inputs[3].data;
    c.mask_offset = step->mask_offset.data();
  }
  c.causal = a.step->ints[0] != 0;
  c.scale = a.real(0, 1.0f);
  c.q = q.data, c.k = k.data, c.v = v.data, c.out = a.output.data;
  step->kernels = a.kernels;
  step->tasks = c.batch;
  step->scratch = a.kernels->attention_scratch(c);
  return step;
}

}  // namespace growfx_native
