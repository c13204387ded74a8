// How inputs become planes whose values lie as the kernel reads them, and folded outputs become images again.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "sparse_vectors.h"

namespace {

constexpr int64_t COPY_GRAIN = 20000;

// What sparse_kernel.py works out once for each input shape; the order is `_Plan`'s.
struct Plan {
  int64_t layout, images, channels, height, width, out_channels, out_height, out_width, stride_h, stride_w, padding_h,
      padding_w, dilation_w, block, phases, rows, plane_size, positions;
};
enum Layout : int64_t { DIRECT = 0, COPIED = 1, FOLDED = 2, ROWS = 3 };

inline int64_t registers_of(int64_t positions) { return (positions + LANES - 1) / LANES; }
inline int64_t whole_registers(int64_t positions) { return registers_of(positions) * LANES; }

template <class F>
void for_each(int64_t count, int64_t grain, bool together, const F& function) {
  if (together) at::parallel_for(0, count, std::max<int64_t>(grain, 1), function);
  else function(0, count);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Every `step`-th of the values from `source` on. Before `end`, where the input's memory ends, whole registers are
// written, past `count` too.
template <class T>
inline void copy_row(const T* source, const T* end, int64_t step, int64_t count, float* out) {
  int64_t i = 0;
  if (step == 1) {
    for (; i < count && end - source >= i + LANES; i += LANES) store(out + i, load(source + i));
  } else if (step == 2) {
    for (; i < count && end - source >= 2 * (i + LANES); i += LANES)
      store(out + i, every_second(load(source + 2 * i), load(source + 2 * i + LANES)));
  }
  for (; i < count; ++i) out[i] = static_cast<float>(source[step * i]);
}

// Rows of a plane, in every phase.
struct Band {
  int64_t first, end;
};

// One channel of one image into a band of one plane, row after row; `row` is the distance between them.
template <class T>
void copy_plane(const Plan& p, Band band, const T* image, const T* end, int64_t column, int64_t row, float* plane) {
  const int64_t shift = column * p.dilation_w - p.padding_w;
  const int64_t low = std::clamp<int64_t>(ceil_div(-shift, p.stride_w), 0, p.out_width);
  const int64_t high = std::clamp<int64_t>(ceil_div(p.width - shift, p.stride_w), low, p.out_width);
  for (int64_t phase = 0; phase < p.phases; ++phase, plane += p.rows * row) {
    for (int64_t j = band.first; j < band.end; ++j) {
      float* const to_row = plane + j * row;
      const int64_t y = j * p.stride_h + phase - p.padding_h;
      const bool inside = y >= 0 && y < p.height;
      const int64_t from = inside ? low : p.out_width, to = inside ? high : p.out_width;
      for (int64_t i = 0; i < from; ++i) to_row[i] = 0.0f;
      if (from < to)
        copy_row(image + y * p.width + from * p.stride_w + shift, end, p.stride_w, to - from, to_row + from);
      for (int64_t i = to; i < p.out_width; ++i) to_row[i] = 0.0f;
    }
  }
}

// A band of the planes of images first..first + block; images beyond the last are zeros.
template <class T>
void copy_planes(const Plan& p, Band band, const T* x, const int32_t* planes, int64_t count, int64_t first,
                 bool together, float* out) {
  const int64_t row = p.block * p.out_width, image = p.height * p.width, used = std::min(p.block, p.images - first);
  // Where images stand side by side, what is written past a row would fall on one that is already there.
  const T* const limit = p.layout == FOLDED ? x : x + p.images * p.channels * image;
  for_each(count, COPY_GRAIN / (p.plane_size + 1), together, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const plane = out + i * p.plane_size;
      if (used < p.block) std::fill_n(plane, p.plane_size, 0.0f);
      for (int64_t n = 0; n < used; ++n) {
        const T* const source = x + ((first + n) * p.channels + planes[2 * i]) * image;
        copy_plane(p, band, source, limit, planes[2 * i + 1], row, plane + n * p.out_width);
      }
    }
  });
}

// A matrix of at least LANES rows and columns the other way round: `source(row, column)` reads a register along a row,
// `put(column, row, values)` takes one along a column. The last blocks overlap those before.
template <class Source, class Put>
void transpose_matrix(int64_t rows, int64_t columns, bool together, const Source& source, const Put& put) {
  for_each(registers_of(columns), COPY_GRAIN / (rows * LANES), together, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t column = std::min(g * LANES, columns - LANES);
      for (int64_t r = 0; r < rows; r += LANES) {
        const int64_t row = std::min(r, rows - LANES);
        Vector block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) block[i] = source(row + i, column);
        transpose(block);
        // What the block before has, another thread may be writing.
        for (int64_t i = g * LANES - column; i < LANES; ++i) put(column + i, row, block[i]);
      }
    }
  });
}

// Rows of inputs, images first..first + block, into planes of one value for each image.
template <class T>
void copy_rows(const Plan& p, const T* x, int64_t first, bool together, float* out) {
  const int64_t used = std::min(p.block, p.images - first);
  const T* const rows = x + first * p.channels;
  const auto source = [&](int64_t n, int64_t c) { return n < used ? load(rows + n * p.channels + c) : Vector{}; };
  const auto put = [&](int64_t c, int64_t n, Vector v) { store(out + c * p.plane_size + n, v); };
  transpose_matrix(whole_registers(p.block), p.channels, together, source, put);
}

// The folded output (channel, row, image, column) back into images, with what is added after the sums.
template <class T>
void unfold(const Plan& p, const float* sums, int64_t first, const T* residual, bool relu, bool together, T* out) {
  const int64_t row = p.block * p.out_width, size = p.out_height * p.out_width, channels = p.out_channels;
  const int64_t stride = whole_registers(p.positions), used = std::min(p.block, p.images - first);
  for_each(used, COPY_GRAIN / (channels * size), together, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t o = 0; o < channels; ++o) {
        const float* source = sums + o * stride + n * p.out_width;
        int64_t where = ((first + n) * channels + o) * size;
        for (int64_t y = 0; y < p.out_height; ++y, source += row) {
          for (int64_t i = 0; i < p.out_width; ++i, ++where) {
            float v = source[i];
            if (residual) v += static_cast<float>(residual[where]);
            out[where] = static_cast<T>(relu && v < 0.0f ? 0.0f : v);
          }
        }
      }
    }
  });
}

// The same where an image has one position and more channels than a register.
template <class T>
void unfold_rows(const Plan& p, const float* sums, int64_t first, const T* residual, bool relu, bool together, T* out) {
  const int64_t stride = whole_registers(p.positions), used = std::min(p.block, p.images - first);
  const auto source = [&](int64_t o, int64_t n) { return load(sums + o * stride + n); };
  const auto put = [&](int64_t n, int64_t o, Vector v) {
    if (n >= used) return;
    const int64_t where = (first + n) * p.out_channels + o;
    if (residual) v += load(residual + where);
    store(out + where, relu ? rectified(v) : v);
  };
  transpose_matrix(p.out_channels, stride, together, source, put);
}

}  // namespace
