// Activations with the batch innermost: (channel, depth, height, width, image), as the sparse products read them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../sparse_vectors.h"

namespace {

constexpr int64_t COPY_WORK = 32768;  // values worth a thread of their own

// A matrix the other way round: to[c * to_stride + r] = from[r * from_stride + c], for columns first..end.
template <class From, class To>
void transpose_columns(const From* from, int64_t rows, int64_t columns, int64_t from_stride, To* to, int64_t to_stride,
                       int64_t first, int64_t end) {
  if (rows < LANES || columns < LANES) {
    for (int64_t c = first; c < end; ++c)
      for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = static_cast<To>(float(from[r * from_stride + c]));
    return;
  }
  for (int64_t c = first; c < end; c += LANES) {
    const int64_t column = std::min(c, columns - LANES), stop = std::min<int64_t>(end - column, LANES);
    for (int64_t r = 0; r < rows; r += LANES) {
      const int64_t row = std::min(r, rows - LANES);
      Vector block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) block[i] = load(from + (row + i) * from_stride + column);
      transpose(block);
      if (c == column && stop == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(to + (column + i) * to_stride + row, block[i]);
      } else {
        for (int64_t i = c - column; i < stop; ++i) store(to + (column + i) * to_stride + row, block[i]);
      }
    }
  }
}

template <class From, class To>
void transpose_matrix(const From* from, int64_t rows, int64_t columns, int64_t from_stride, To* to, int64_t to_stride) {
  const int64_t blocks = (columns + LANES - 1) / LANES;
  at::parallel_for(0, blocks, std::max<int64_t>(1, COPY_WORK / (rows * LANES)), [&](int64_t begin, int64_t end) {
    transpose_columns(from, rows, columns, from_stride, to, to_stride, begin * LANES, std::min(end * LANES, columns));
  });
}

// Values from one channel's plane to the next. Planes at a multiple of some power of two would share a few sets of the
// caches, so that hardly any of what is read again would still be there.
inline int64_t padded_plane(int64_t values) {
  constexpr int64_t LINE = 16;
  if (values % (8 * LINE)) return values;
  const int64_t lines = values / LINE;
  return values + LINE * (lines < 64 ? 1 : 9 - lines % 16);
}

// Values of one plane: those of a channel, of all places and images.
inline int64_t plane_size(at::IntArrayRef sizes) {
  int64_t size = sizes[0];
  for (size_t axis = 2; axis < sizes.size(); ++axis) size *= sizes[axis];
  return size;
}

inline std::vector<int64_t> inner_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t size = sizes[0];
  for (size_t axis = sizes.size() - 1; axis > 1; --axis) strides[axis] = size, size *= sizes[axis];
  strides[1] = padded_plane(size);
  return strides;
}

inline int64_t plane_stride(const at::Tensor& x) {
  return x.size(1) > 1 ? x.stride(1) : plane_size(x.sizes());
}

inline bool batch_is_inner(const at::Tensor& x) {
  int64_t size = x.size(0);
  if (x.size(0) != 1 && x.stride(0) != 1) return false;
  for (int64_t axis = x.dim() - 1; axis > 1; size *= x.size(axis), --axis)
    if (x.size(axis) != 1 && x.stride(axis) != size) return false;
  return x.size(1) == 1 || x.stride(1) >= size;
}

inline at::Tensor empty_inner(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty_strided(sizes, inner_strides(sizes), options);
}

inline bool has_strides(const at::Tensor& x, const std::vector<int64_t>& strides) {
  for (int64_t axis = 0; axis < x.dim(); ++axis)
    if (x.size(axis) != 1 && x.stride(axis) != strides[axis]) return false;
  return true;
}

inline bool channel_is_inner(const at::Tensor& x) {
  std::vector<int64_t> strides(x.dim(), 1);
  int64_t size = x.size(1);
  for (int64_t axis = x.dim() - 1; axis > 1; --axis) strides[axis] = size, size *= x.size(axis);
  strides[0] = size;
  return x.dim() > 2 && has_strides(x, strides);
}

template <class T>
void to_inner(const at::Tensor& x, float* out, int64_t plane) {
  const int64_t images = x.size(0), channels = x.size(1), places = x.numel() / (images * channels);
  if (channel_is_inner(x)) {
    const T* const from = x.const_data_ptr<T>();
    at::parallel_for(0, places, std::max<int64_t>(1, COPY_WORK / (images * channels)), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        transpose_columns(from + s * channels, images, channels, places * channels, out + s * images, plane, 0,
                          channels);
    });
    return;
  }
  const at::Tensor whole = x.contiguous();
  const T* const from = whole.const_data_ptr<T>();
  if (places == 1) return transpose_matrix(from, images, channels, channels, out, plane);
  at::parallel_for(0, channels, std::max<int64_t>(1, COPY_WORK / (images * places)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      transpose_columns(from + c * places, images, places, channels * places, out + c * plane, images, 0, places);
  });
}

template <class T>
void to_outer(const float* from, int64_t plane, const at::Tensor& out) {
  const int64_t images = out.size(0), channels = out.size(1), places = out.numel() / (images * channels);
  T* const to = out.mutable_data_ptr<T>();
  if (places == 1) return transpose_matrix(from, channels, images, plane, to, channels);
  at::parallel_for(0, channels, std::max<int64_t>(1, COPY_WORK / (images * places)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      transpose_columns(from + c * plane, places, images, images, to + c * places, channels * places, 0, images);
  });
}

// `x` as float32 with the batch innermost: itself where it lies so.
inline at::Tensor with_inner_batch(const at::Tensor& x) {
  if (x.scalar_type() == at::kFloat && batch_is_inner(x)) return x;
  at::Tensor out = empty_inner(x.sizes(), x.options().dtype(at::kFloat));
  if (x.numel() == 0) return out;
  float* const to = out.mutable_data_ptr<float>();
  if (batch_is_inner(x)) out.copy_(x);
  else if (x.scalar_type() == at::kBFloat16) to_inner<c10::BFloat16>(x, to, plane_stride(out));
  else to_inner<float>(x, to, plane_stride(out));
  return out;
}

// The other way round: contiguous, of type `dtype`.
inline at::Tensor with_outer_batch(const at::Tensor& x, at::ScalarType dtype) {
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  if (x.numel() == 0) return out;
  if (!batch_is_inner(x)) return out.copy_(x);
  if (dtype == at::kBFloat16) to_outer<c10::BFloat16>(x.const_data_ptr<float>(), plane_stride(x), out);
  else to_outer<float>(x.const_data_ptr<float>(), plane_stride(x), out);
  return out;
}

}  // namespace
