// What a sparse product of a convolution visits: runs of destination values that lie one after another in memory, read
// one after another, and see the same taps of the kernel.
//
// A tap is a position of the kernel. At a destination place some taps fall outside the source: those inside form, along
// each axis, one range of the axis's tap order. Places with the same ranges make a group, so that no border has to be
// padded and no entry is multiplied with zeros.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

// Sizes of one axis of a convolution.
struct AxisSizes {
  int64_t in, out, kernel, stride, padding, dilation;  // padding: before the first
};

// Where one destination coordinate reads: taps first..end in the axis's order, at `base + shift[tap]`.
struct Place {
  int32_t base, first, end;
};

struct Axis {
  std::vector<int32_t> order;  // taps, in the order of the entry lists
  std::vector<int32_t> shift;  // by tap in that order
  std::vector<Place> places;   // by destination coordinate
  bool together;               // neighbours in the destination are neighbours in the source
};

// Output coordinate y reads y * stride - padding + tap * dilation.
inline Axis reading_axis(const AxisSizes& s) {
  Axis axis;
  axis.together = s.stride == 1;
  for (int64_t k = 0; k < s.kernel; ++k) {
    axis.order.push_back(k);
    axis.shift.push_back(k * s.dilation);
  }
  for (int64_t y = 0; y < s.out; ++y) {
    const int64_t base = y * s.stride - s.padding;
    int64_t first = 0, end = s.kernel;
    while (first < end && base + first * s.dilation < 0) ++first;
    while (end > first && base + (end - 1) * s.dilation >= s.in) --end;
    if (first == end) first = end = 0;
    axis.places.push_back({int32_t(base), int32_t(first), int32_t(end)});
  }
  return axis;
}

// The taps of `writing_axis`: those that reach the same phase (coordinate modulo stride) together, in order.
inline std::vector<int32_t> writing_order(const AxisSizes& s) {
  std::vector<int32_t> order(s.kernel);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return a * s.dilation % s.stride < b * s.dilation % s.stride;
  });
  return order;
}

// The same convolution seen from its input: coordinate h is read by outputs (h + padding - tap * dilation) / stride.
inline Axis writing_axis(const AxisSizes& s) {
  Axis axis;
  axis.together = s.stride == 1;
  axis.order = writing_order(s);
  for (const int32_t k : axis.order) axis.shift.push_back(-(k * s.dilation / s.stride));
  for (int64_t h = 0; h < s.in; ++h) {
    const int64_t phase = (h + s.padding) % s.stride, base = (h + s.padding) / s.stride;
    int64_t first = 0;
    while (first < s.kernel && axis.order[first] * s.dilation % s.stride != phase) ++first;
    int64_t end = first;
    while (end < s.kernel && axis.order[end] * s.dilation % s.stride == phase) ++end;
    while (first < end && base + axis.shift[first] >= s.out) ++first;
    while (end > first && base + axis.shift[end - 1] < 0) --end;
    if (first == end) first = end = 0;
    axis.places.push_back({int32_t(base), int32_t(first), int32_t(end)});
  }
  return axis;
}

using Sizes = std::array<AxisSizes, 3>;  // depth, height, width
using Axes = std::array<Axis, 3>;

struct Range {
  int32_t first, end;  // taps, in the order of the entry lists
};
struct Run {
  int64_t to, from;  // offsets of its first values in a destination and a source plane, in values
};
struct Group {
  std::vector<Range> ranges;
  std::vector<Run> runs;
  int64_t length;  // of each run, in values
};
// `runs` runs of a group from `first` on, at the `registers` registers from value `at` on; the first `doubled` values
// belong to another tile too.
struct Tile {
  int32_t group, first, runs, registers, doubled;
  int64_t at;
};

// Neighbouring columns that see the same taps.
struct Strip {
  Place place;
  int32_t column, columns;
};

inline std::vector<Strip> strips_of(const Axis& width, bool merge) {
  std::vector<Strip> strips;
  for (int32_t x = 0; x < int32_t(width.places.size()); ++x) {
    const Place& p = width.places[x];
    if (merge && width.together && !strips.empty() && strips.back().place.first == p.first && strips.back().place.end == p.end)
      ++strips.back().columns;
    else strips.push_back({p, x, 1});
  }
  return strips;
}

// Ranges of taps in the order (depth, height, width) of the three axes' orders.
inline std::vector<Range> ranges_of(const Axes& axes, const Place& d, const Place& h, const Place& w) {
  const int32_t rows = axes[1].order.size(), columns = axes[2].order.size();
  std::vector<Range> ranges;
  if (w.first == w.end) return ranges;
  for (int32_t z = d.first; z < d.end; ++z) {
    for (int32_t y = h.first; y < h.end; ++y) {
      const int32_t row = (z * rows + y) * columns;
      if (!ranges.empty() && ranges.back().end == row + w.first) ranges.back().end = row + w.end;
      else ranges.push_back({row + w.first, row + w.end});
    }
  }
  return ranges;
}

// The groups of all destination places; `from`: sizes (height, width) of a source plane, `inner`: values of one place.
inline std::vector<Group> groups_of(const Axes& axes, int64_t from_height, int64_t from_width, int64_t inner, bool merge) {
  struct Key {
    std::array<int32_t, 7> values;
    bool operator==(const Key& other) const { return values == other.values; }
  };
  const std::vector<Strip> strips = strips_of(axes[2], merge);
  const int64_t height = axes[1].places.size(), width = axes[2].places.size();
  std::vector<Key> keys;
  std::vector<Group> groups;
  for (int64_t z = 0; z < int64_t(axes[0].places.size()); ++z) {
    const Place& d = axes[0].places[z];
    for (int64_t y = 0; y < height; ++y) {
      const Place& h = axes[1].places[y];
      for (const Strip& strip : strips) {
        const Place& w = strip.place;
        const Key key{{d.first, d.end, h.first, h.end, w.first, w.end, strip.columns}};
        size_t g = std::find(keys.begin(), keys.end(), key) - keys.begin();
        if (g == keys.size()) {
          keys.push_back(key);
          groups.push_back({ranges_of(axes, d, h, w), {}, strip.columns * inner});
        }
        const int64_t to = (z * height + y) * width + strip.column;
        const int64_t from = (int64_t(d.base) * from_height + h.base) * from_width + w.base;
        groups[g].runs.push_back({to * inner, from * inner});
      }
    }
  }
  return groups;
}

// How far each tap reads from a run's base, in values of a source plane.
inline std::vector<int64_t> tap_shifts(const Axes& axes, int64_t from_height, int64_t from_width, int64_t inner) {
  std::vector<int64_t> shifts;
  for (const int64_t z : axes[0].shift)
    for (const int64_t y : axes[1].shift)
      for (const int64_t x : axes[2].shift) shifts.push_back(((z * from_height + y) * from_width + x) * inner);
  return shifts;
}

// Tiles of at most `most` registers that cover all runs: several neighbouring runs at a time, which share much of what
// they read, piece after piece. Where a run ends within a register, that register is moved back to the run's end.
inline std::vector<Tile> tiles_of(const std::vector<Group>& groups, int most, int lanes) {
  std::vector<Tile> tiles;
  const auto add = [&](int32_t g, int size, int64_t pieces, int64_t at, int doubled) {
    const int32_t runs = groups[g].runs.size();
    for (int32_t first = 0, count; first < runs && pieces > 0; first += count) {
      for (count = most / size; count > runs - first;) count /= 2;
      for (int64_t c = 0; c < pieces; ++c) tiles.push_back({g, first, count, size, doubled, at + c * size * lanes});
    }
  };
  for (int32_t g = 0; g < int32_t(groups.size()); ++g) {
    const int64_t length = groups[g].length, registers = length / lanes;
    add(g, most, registers / most, 0, 0);
    for (int size = most / 2; size > 0; size /= 2) add(g, size, registers / size % 2, registers / (2 * size) * 2 * size * lanes, 0);
    if (length % lanes) add(g, 1, 1, std::max<int64_t>(0, length - lanes), registers ? lanes - length % lanes : 0);
  }
  return tiles;
}

}  // namespace
