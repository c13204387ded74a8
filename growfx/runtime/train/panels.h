// Products with a weight whose rows are nearly dense, in the layout of the sparse products: rows of a panel share what
// they read, and entries that are absent are multiplied as zeros.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../sparse_vectors.h"
#include "geometry.h"
#include "products.h"

namespace {

constexpr int PANEL = 4;                   // rows that share what they read, and columns that share gradients
constexpr int WIDTH = LANES == 8 ? 2 : 4;  // registers of each row; AVX has 16 in all
constexpr int64_t PANEL_BYTES = 24576;     // what a tile may read of a block of columns: most of a first cache

// A weight by panels of rows: of block b, panel p, tap t and column c of the block the values of PANEL rows. The last
// panel is filled up with zeros.
struct Panels {
  int64_t rows, columns, taps, block;
  std::unique_ptr<int32_t[]> offset;  // of block, tap and column, from a run's base, in values
  std::unique_ptr<float[]> weight;
  int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
};

inline Panels panels_of(int64_t rows, int64_t columns, int64_t taps, const std::vector<int64_t>& shifts,
                        int64_t from_plane) {
  const int64_t block = std::clamp<int64_t>(PANEL_BYTES / (taps * WIDTH * LANES * 4), 1, columns);
  Panels p{rows, columns, taps, block, nullptr, nullptr};
  p.offset.reset(new int32_t[columns * taps]);
  int32_t* next = p.offset.get();
  for (int64_t first = 0; first < columns; first += block)
    for (const int64_t shift : shifts)
      for (int64_t c = first; c < std::min(first + block, columns); ++c) *next++ = c * from_plane + shift;
  return p;
}

// Calls `use(row, tap, k)` for every entry k of a list whose tap is `seen`.
template <class F>
void for_entries(const Entries& e, const std::vector<Range>& seen, const F& use) {
  for (int64_t r = 0; r < e.blocks * e.rows; ++r)
    for (const Range range : seen)
      for (int64_t t = range.first; t < range.end; ++t)
        for (int64_t k = e.start[r * e.taps + t]; k < e.start[r * e.taps + t + 1]; ++k) use(r % e.rows, t, k);
}

inline void fill_panels(Panels& p, const Entries& e, const std::vector<Range>& seen, const int32_t* source) {
  const int64_t size = p.panels() * PANEL * p.columns * p.taps;
  p.weight.reset(new float[size]());
  float* const w = p.weight.get();
  for_entries(e, seen, [&](int64_t row, int64_t tap, int64_t k) {
    const int64_t column = source[k] / p.taps, first = column / p.block * p.block;
    const int64_t count = std::min(p.block, p.columns - first), at = first * p.panels() + row / PANEL * count;
    w[(at * p.taps + tap * count + column - first) * PANEL + row % PANEL] = e.value[k];
  });
}

// Keeps a loaded value in its register: compilers would rather load it again for each of its uses, and loads are what
// these loops have too many of.
inline void keep(Vector& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// Not inlined: the loops need every register there is.
template <int RUNS, int REGISTERS>
[[gnu::noinline]] void multiply_panels(const Panels& p, const std::vector<Range>& ranges, const Run* runs, int64_t at,
                                       const float* source, float* out, int64_t plane, const float* bias) {
  const float* from[RUNS];
  for (int n = 0; n < RUNS; ++n) from[n] = source + runs[n].from + at;
  const int32_t* offset = p.offset.get();
  const float* weight = p.weight.get();
  for (int64_t first = 0; first < p.columns; first += p.block) {
    const int64_t columns = std::min(p.block, p.columns - first);
    for (int64_t row = 0; row < p.rows; row += PANEL, weight += p.taps * columns * PANEL) {
      const int64_t count = std::min<int64_t>(PANEL, p.rows - row);
      float* const to = out + row * plane + at;
      Vector sum[PANEL][RUNS][REGISTERS] = {};
      if (first > 0) {
#pragma GCC unroll 8
        for (int i = 0; i < PANEL; ++i)
          if (i < count)
#pragma GCC unroll 8
            for (int n = 0; n < RUNS; ++n)
#pragma GCC unroll 8
              for (int r = 0; r < REGISTERS; ++r) sum[i][n][r] = load(to + i * plane + runs[n].to + r * LANES);
      }
      for (const Range range : ranges) {
        for (int64_t k = range.first * columns; k < range.end * columns; ++k) {
          const int64_t here = offset[k];
          const float* const w = weight + k * PANEL;
          Vector x[RUNS][REGISTERS];
#pragma GCC unroll 8
          for (int n = 0; n < RUNS; ++n)
#pragma GCC unroll 8
            for (int r = 0; r < REGISTERS; ++r) x[n][r] = load(from[n] + here + r * LANES), keep(x[n][r]);
#pragma GCC unroll 8
          for (int i = 0; i < PANEL; ++i)
#pragma GCC unroll 8
            for (int n = 0; n < RUNS; ++n)
#pragma GCC unroll 8
              for (int r = 0; r < REGISTERS; ++r) sum[i][n][r] += w[i] * x[n][r];
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < PANEL; ++i) {
        if (i >= count) continue;
        const float added = bias && first == 0 ? bias[row + i] : 0.0f;
#pragma GCC unroll 8
        for (int n = 0; n < RUNS; ++n)
#pragma GCC unroll 8
          for (int r = 0; r < REGISTERS; ++r)
            store(to + i * plane + runs[n].to + r * LANES, sum[i][n][r] + added);
      }
    }
    offset += p.taps * columns;
  }
}

// Values of a source that meet gradients of as many places at one tap.
struct Stretch {
  int64_t to, from, length;
};

constexpr int64_t CHUNK = 64 * LANES;  // values of a plane worked on at a time

// For each tap the stretches of all its places, cut into chunks of about CHUNK values.
using Chunks = std::vector<std::vector<std::vector<Stretch>>>;

inline Chunks chunks_of(const Axes& axes, int64_t from_height, int64_t from_width, int64_t inner) {
  Chunks chunks;
  const auto sees = [](const Place& place, int32_t tap) { return place.first <= tap && tap < place.end; };
  const int64_t height = axes[1].places.size(), width = axes[2].places.size();
  for (int32_t tz = 0; tz < int32_t(axes[0].order.size()); ++tz)
    for (int32_t ty = 0; ty < int32_t(axes[1].order.size()); ++ty)
      for (int32_t tx = 0; tx < int32_t(axes[2].order.size()); ++tx) {
        std::vector<std::vector<Stretch>> found;
        int64_t room = 0;
        const auto add = [&](Stretch s) {
          while (s.length > 0) {
            if (room <= 0) found.emplace_back(), room = CHUNK;
            const int64_t length = std::min(s.length, room);
            std::vector<Stretch>& last = found.back();
            if (!last.empty() && last.back().to + last.back().length == s.to && last.back().from + last.back().length == s.from)
              last.back().length += length;
            else last.push_back({s.to, s.from, length});
            s = {s.to + length, s.from + length, s.length - length}, room -= length;
          }
        };
        for (int64_t z = 0; z < int64_t(axes[0].places.size()); ++z) {
          const Place& d = axes[0].places[z];
          for (int64_t y = 0; y < height && sees(d, tz); ++y) {
            const Place& h = axes[1].places[y];
            for (int64_t x = 0; x < width && sees(h, ty); ++x) {
              const Place& w = axes[2].places[x];
              if (!sees(w, tx)) continue;
              const int64_t row = (d.base + axes[0].shift[tz]) * from_height + h.base + axes[1].shift[ty];
              add({((z * height + y) * width + x) * inner, (row * from_width + w.base + axes[2].shift[tx]) * inner, inner});
            }
          }
        }
        chunks.push_back(std::move(found));
      }
  return chunks;
}

inline Vector load_part(const float* p, int64_t count) {
  float values[LANES] = {};
  std::copy_n(p, count, values);
  return load(values);
}

// Adds to `result`, row by row, the sums of products of PANEL gradients with PANEL sources.
[[gnu::noinline]] inline void correlate_panels(const std::vector<Stretch>& stretches, const float* const* gradient,
                                               const float* const* source, float* result) {
  static_assert(PANEL * PANEL % LANES == 0);
  Vector sum[PANEL * PANEL] = {};
  const auto add = [&](const auto& read, int64_t to, int64_t from) {
    Vector x[PANEL];
#pragma GCC unroll 8
    for (int c = 0; c < PANEL; ++c) x[c] = read(source[c] + from), keep(x[c]);
#pragma GCC unroll 8
    for (int r = 0; r < PANEL; ++r) {
      Vector g = read(gradient[r] + to);
      keep(g);
#pragma GCC unroll 8
      for (int c = 0; c < PANEL; ++c) sum[r * PANEL + c] += g * x[c];
    }
  };
  for (const Stretch& s : stretches) {
    int64_t i = 0;
    for (; i + LANES <= s.length; i += LANES) add([](const float* p) { return load(p); }, s.to + i, s.from + i);
    if (i < s.length)
      add([&](const float* p) { return load_part(p, s.length - i); }, s.to + i, s.from + i);
  }
#pragma GCC unroll 4
  for (int part = 0; part < PANEL * PANEL; part += LANES) {
    Vector these[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) these[i] = sum[part + i];
    store(result + part, load(result + part) + totals(these));
  }
}

}  // namespace
