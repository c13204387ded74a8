// A product of one layer: its sizes, the places it visits, and its tiles shared out to threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "entries.h"
#include "geometry.h"
#include "panels.h"
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
  const at::Tensor &start, &source, &back_start, &back_source, &back_order;
  at::IntArrayRef kernel, stride, padding, dilation;
};

// Whether every place of the output reads the same place of the input, and no other.
inline bool is_pointwise(const Geometry& g) {
  for (const AxisSizes& a : g.axes)
    if (a.kernel != 1 || a.stride != 1 || a.padding != 0 || a.in != a.out) return false;
  return true;
}

inline Geometry geometry_of(at::IntArrayRef in, at::IntArrayRef out, const Layer& layer) {
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

// The places of one side of a convolution, and how far each tap reads from them.
struct Visit {
  Axes axes;
  std::vector<Group> groups;
  std::vector<int64_t> shifts;
  std::vector<Range> seen;  // taps that some place reads
};

// `backwards`: destinations are places of the input, sources places of the output.
inline Visit visit_of(const Geometry& g, bool backwards) {
  Visit v;
  for (int a = 0; a < 3; ++a) v.axes[a] = backwards ? writing_axis(g.axes[a]) : reading_axis(g.axes[a]);
  const auto from = [&](int a) { return backwards ? g.axes[a].out : g.axes[a].in; };
  v.groups = groups_of(v.axes, from(1), from(2), g.images, g.images % (2 * LANES) != 0);
  v.shifts = tap_shifts(v.axes, from(1), from(2), g.images);
  std::vector<bool> seen(g.taps, false);
  for (const Group& group : v.groups)
    for (const Range range : group.ranges) std::fill(seen.begin() + range.first, seen.begin() + range.end, true);
  for (int32_t t = 0; t < g.taps; ++t) {
    if (!seen[t]) continue;
    if (v.seen.empty() || v.seen.back().end != t) v.seen.push_back({t, t});
    ++v.seen.back().end;
  }
  return v;
}

// The entries of a layer by output channel or, backwards, by input channel, and what each reads: channel * taps + tap.
struct Listed {
  Entries entries;
  const int32_t* source;
  std::unique_ptr<int32_t[]> offset;
  std::unique_ptr<float[]> value;
};

inline Listed list_of(const Geometry& g, const Layer& layer, bool backwards) {
  const int64_t rows = backwards ? g.channels : g.out_channels;
  const at::Tensor &starts = backwards ? layer.back_start : layer.start,
                   &sources = backwards ? layer.back_source : layer.source;
  const int32_t* const start = starts.const_data_ptr<int32_t>();
  return {{(starts.numel() - 1) / (rows * g.taps), rows, g.taps, start, nullptr, nullptr},
          sources.const_data_ptr<int32_t>(), nullptr, nullptr};
}

// Calls `use(k)`, in parallel, for every entry k that some place reads with.
template <class F>
void for_seen(const Entries& e, const std::vector<Range>& seen, const F& use) {
  const int64_t segments = e.blocks * e.rows;
  if (seen.size() == 1 && seen[0].end - seen[0].first == e.taps) {
    at::parallel_for(0, e.start[segments * e.taps], 16384, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) use(k);
    });
    return;
  }
  at::parallel_for(0, segments, std::max<int64_t>(1, 16384 / e.taps), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (const Range range : seen)
        for (int64_t k = e.start[r * e.taps + range.first]; k < e.start[r * e.taps + range.end]; ++k) use(k);
  });
}

// Where each entry reads, from the base of a run; `plane`: values from one plane of the source to the next.
inline void find_offsets(Listed& l, const Visit& v, int64_t columns, int64_t plane) {
  const int64_t taps = l.entries.taps;
  const std::unique_ptr<int32_t[]> offset_of(new int32_t[columns * taps]);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t t = 0; t < taps; ++t) offset_of[c * taps + t] = c * plane + v.shifts[t];
  l.offset.reset(new int32_t[l.entries.start[l.entries.blocks * l.entries.rows * taps]]);
  for_seen(l.entries, v.seen, [from = offset_of.get(), to = l.offset.get(), source = l.source](int64_t k) {
    to[k] = from[source[k]];
  });
  l.entries.offset = l.offset.get();
}

// Values of the entries, which are given in the order of output channels; `order`: which of them each is, or none.
inline void find_values(Listed& l, const Visit& v, const float* values, const int32_t* order) {
  l.entries.value = values;
  if (!order) return;
  l.value.reset(new float[l.entries.start[l.entries.blocks * l.entries.rows * l.entries.taps]]);
  for_seen(l.entries, v.seen, [values, to = l.value.get(), order](int64_t k) { to[k] = values[order[k]]; });
  l.entries.value = l.value.get();
}

// One product: out = bias + weight * source.
struct Operands {
  const float *source, *bias;
  float* out;
  int64_t from_plane, to_plane;  // values from one plane of source and destination to the next
};

// A tile's outputs apart from the others', of which some values are another tile's: threads must not share them while
// sums grow.
struct Apart {
  std::vector<Run> runs;
  std::vector<float> values;
  Apart(const Tile& tile, const Run* of, int64_t rows) : runs(of, of + tile.runs), values(rows * tile.runs * LANES) {
    for (int64_t p = 0; p < tile.runs; ++p) runs[p].to = p * LANES - tile.at;
  }
  int64_t plane() const { return runs.size() * LANES; }
  void copy_to(float* out, int64_t to_plane, const Tile& tile, const Run* of) const {
    for (int64_t i = 0; i < int64_t(values.size()); i += LANES) {
      const int64_t row = i / plane(), p = i % plane() / LANES;
      float* const to = out + row * to_plane + of[p].to + tile.at;
      std::copy(&values[i] + tile.doubled, &values[i] + LANES, to + tile.doubled);
    }
  }
};

// Calls `use(group, runs, tile, out, plane)` for every tile, in parallel, to write its outputs of all `rows` to `out`;
// `cost`: register updates of one tile over its registers.
template <class F>
void for_tiles(const std::vector<Group>& groups, int most, int64_t rows, int64_t cost, const Operands& o,
               const F& use) {
  const std::vector<Tile> tiles = tiles_of(groups, most, LANES);
  at::parallel_for(0, tiles.size(), std::max<int64_t>(1, THREAD_WORK / cost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = tiles[i];
      const Group& group = groups[tile.group];
      const Run* const runs = group.runs.data() + tile.first;
      if (tile.doubled == 0) {
        use(group, runs, tile, o.out, o.to_plane);
        continue;
      }
      Apart apart(tile, runs, rows);
      use(group, apart.runs.data(), tile, apart.values.data(), apart.plane());
      apart.copy_to(o.out, o.to_plane, tile, runs);
    }
  });
}

inline void multiply_by_entries(const Visit& v, Listed& l, int64_t columns, const Operands& o) {
  find_offsets(l, v, columns, o.from_plane);
  const Entries& e = l.entries;
  const int64_t segments = e.blocks * e.rows, cost = e.start[segments * e.taps] + 4 * segments;
  for_tiles(v.groups, TILE, e.rows, cost, o,
            [&](const Group& group, const Run* runs, const Tile& tile, float* out, int64_t plane) {
              if (group.length < LANES)
                return multiply_short(e, group, runs, tile.runs, o.source, out, plane, o.bias);
              dispatch<TILE>(tile, [&](auto count, auto registers) {
                multiply<count(), registers()>(e, group.ranges, runs, tile.at, o.source, out, plane, o.bias);
              });
            });
}

inline void multiply_by_panels(const Visit& v, const Listed& l, int64_t columns, const Operands& o) {
  Panels p = panels_of(l.entries.rows, columns, l.entries.taps, v.shifts, o.from_plane);
  fill_panels(p, l.entries, v.seen, l.source);
  for_tiles(v.groups, WIDTH, p.rows, p.rows * p.columns * p.taps, o,
            [&](const Group& group, const Run* runs, const Tile& tile, float* out, int64_t plane) {
              dispatch<WIDTH>(tile, [&](auto count, auto registers) {
                multiply_panels<count(), registers()>(p, group.ranges, runs, tile.at, o.source, out, plane, o.bias);
              });
            });
}

// `panels`: whether rows are so dense that they are to be taken by panels.
inline void run_multiply(const Geometry& g, const Layer& layer, bool backwards, bool panels, const float* values,
                         const Operands& o) {
  const Visit v = visit_of(g, backwards);
  Listed l = list_of(g, layer, backwards);
  find_values(l, v, values, backwards ? layer.back_order.const_data_ptr<int32_t>() : nullptr);
  const int64_t columns = backwards ? g.out_channels : g.channels;
  if (panels && g.images >= LANES) multiply_by_panels(v, l, columns, o);
  else multiply_by_entries(v, l, columns, o);
}

inline void correlate_by_entries(const Visit& v, Listed& l, int64_t columns, const float* source, int64_t from_plane,
                                 const float* gradient, int64_t plane, float* result) {
  find_offsets(l, v, columns, from_plane);
  const std::vector<Tile> tiles = tiles_of(v.groups, HELD, LANES);
  const Entries& e = l.entries;
  const int64_t rows = e.rows, shares = std::min<int64_t>(at::get_num_threads(), rows);
  std::vector<int64_t> work(rows + 1, 0);  // before each row
  for (int64_t row = 0; row < rows; ++row) {
    work[row + 1] = work[row] + 1;
    for (int64_t b = 0; b < e.blocks; ++b) {
      const int32_t* const here = e.start + (b * rows + row) * e.taps;
      work[row + 1] += here[e.taps] - here[0];
    }
  }
  const auto row_at = [&](int64_t share) {  // equal by entries
    return std::lower_bound(work.begin(), work.end(), work[rows] * share / shares) - work.begin();
  };
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = row_at(begin), last = row_at(end);
    for (const Tile& tile : tiles) {
      const Group& group = v.groups[tile.group];
      const Run* const runs = group.runs.data() + tile.first;
      if (group.length < LANES) {
        correlate_short(e, group, runs, tile.runs, source, gradient, plane, first, last, result);
        continue;
      }
      dispatch<HELD>(tile, [&](auto count, auto registers) {
        correlate<count(), registers()>(e, group.ranges, runs, tile.at, tile.doubled, source, gradient, plane, first,
                                        last, result);
      });
    }
  });
}

inline void correlate_by_panels(const Visit& v, const Geometry& g, const Listed& l, const float* source,
                                int64_t from_plane, const float* gradient, int64_t plane, float* result) {
  constexpr int64_t SIZE = PANEL * PANEL;
  const Chunks chunks = chunks_of(v.axes, g.axes[1].in, g.axes[2].in, g.images);
  const int64_t rows = g.out_channels, columns = g.channels, across = (columns + PANEL - 1) / PANEL;
  const int64_t panels = (rows + PANEL - 1) / PANEL, count = panels * g.taps * across * SIZE;
  const std::unique_ptr<float[]> all(new float[count]());
  size_t most = 0;
  for (const auto& of_tap : chunks) most = std::max(most, of_tap.size());
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < most; ++i)
      for (int64_t p = begin; p < end; ++p) {
        const float* to[PANEL];
        for (int r = 0; r < PANEL; ++r) to[r] = gradient + std::min(p * PANEL + r, rows - 1) * plane;
        for (int64_t t = 0; t < g.taps; ++t) {
          if (i >= chunks[t].size()) continue;
          for (int64_t c = 0; c < across; ++c) {
            const float* from[PANEL];
            for (int j = 0; j < PANEL; ++j) from[j] = source + std::min(c * PANEL + j, columns - 1) * from_plane;
            correlate_panels(chunks[t][i], to, from, all.get() + ((p * g.taps + t) * across + c) * SIZE);
          }
        }
      }
  });
  for_entries(l.entries, v.seen, [&](int64_t row, int64_t tap, int64_t k) {
    const int64_t column = l.source[k] / g.taps, at = ((row / PANEL * g.taps + tap) * across + column / PANEL) * SIZE;
    result[k] = all[at + row % PANEL * PANEL + column % PANEL];
  });
}

inline void run_correlate(const Geometry& g, const Layer& layer, bool panels, const float* source, int64_t from_plane,
                          const float* gradient, int64_t plane, float* result) {
  const Visit v = visit_of(g, false);
  Listed l = list_of(g, layer, false);
  if (panels && g.images >= LANES) correlate_by_panels(v, g, l, source, from_plane, gradient, plane, result);
  else correlate_by_entries(v, l, g.channels, source, from_plane, gradient, plane, result);
}

}  // namespace
