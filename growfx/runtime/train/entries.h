// The active entries of a masked weight as lists: by output channel for the forward product and the gradient of the
// weight, by input channel for the gradient of the input.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "geometry.h"

namespace {

// `values` are of the last of three axes; those that are not there are `missing`.
inline int64_t axis_of(at::IntArrayRef values, int axis, int64_t missing) {
  const int at = axis - (3 - int(values.size()));
  return at < 0 ? missing : values[at];
}

// Calls `use(row, column, tap)` for every true value of a contiguous mask.
template <class F>
void for_active(const uint8_t* mask, int64_t rows, int64_t columns, int64_t taps, const F& use) {
  const int64_t size = columns * taps;
  for (int64_t o = 0; o < rows; ++o) {
    const uint8_t* const row = mask + o * size;
    for (int64_t j = 0; j < size;) {
      uint64_t word = 1;
      if (j + 8 <= size) std::memcpy(&word, row + j, 8);
      const int64_t stop = std::min<int64_t>(j + 8, size);
      if (word != 0)
        for (int64_t k = j; k < stop; ++k)
          if (row[k]) use(o, k / taps, k % taps);
      j = stop;
    }
  }
}

using Tables = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Groups of channels are blocks of a whole matrix: `columns` channels each, and nothing is active outside of them.
//
// start (blocks * O * taps + 1), source (nnz), index (nnz): entries in the order (block of `block[0]` input channels,
// output channel, tap, input channel), what each reads (input channel * taps + tap), and where each lies in the weight's
// memory. back_start (blocks * I * taps + 1), back_source (nnz), back_order (nnz): entries in the order (block of
// `block[1]` output channels, input channel, tap of the writing order, output channel), what each reads (output channel
// * taps + tap in that order), and which of the former each is.
inline Tables index_mask(const at::Tensor& mask, at::IntArrayRef weight_strides, at::IntArrayRef stride,
                         at::IntArrayRef dilation, at::IntArrayRef block, int64_t groups) {
  const at::Tensor whole = mask.contiguous();
  const int64_t rows = mask.size(0), columns = mask.size(1), channels = columns * groups, of_group = rows / groups;
  std::array<std::vector<int32_t>, 3> order;
  std::array<int64_t, 3> kernel;
  for (int a = 0; a < 3; ++a) {
    kernel[a] = axis_of(mask.sizes().slice(2), a, 1);
    order[a] = writing_order({0, 0, kernel[a], axis_of(stride, a, 1), 0, axis_of(dilation, a, 1)});
  }
  const int64_t taps = kernel[0] * kernel[1] * kernel[2];
  std::vector<int32_t> back(taps), step(taps);  // where a tap stands in the writing order, and in the weight's memory
  int32_t place = 0;
  for (const int32_t z : order[0])
    for (const int32_t y : order[1])
      for (const int32_t x : order[2]) {
        const int64_t tap = (z * kernel[1] + y) * kernel[2] + x;
        const at::IntArrayRef steps = weight_strides.slice(2);
        back[tap] = place++;
        step[tap] = z * axis_of(steps, 0, 0) + y * axis_of(steps, 1, 0) + x * axis_of(steps, 2, 0);
      }
  const auto ints = at::TensorOptions().dtype(at::kInt);
  const int64_t segments = (channels + block[0] - 1) / block[0] * rows * taps;
  const int64_t back_segments = (rows + block[1] - 1) / block[1] * channels * taps;
  at::Tensor start = at::zeros({segments + 1}, ints), back_start = at::zeros({back_segments + 1}, ints);
  const auto segment = [&](int64_t o, int64_t i, int64_t t) { return (i / block[0] * rows + o) * taps + t; };
  const auto back_segment = [&](int64_t o, int64_t i, int64_t t) {
    return (o / block[1] * channels + i) * taps + back[t];
  };
  const auto channel = [&](int64_t o, int64_t i) { return o / of_group * columns + i; };
  int32_t* const s = start.mutable_data_ptr<int32_t>();
  int32_t* const b = back_start.mutable_data_ptr<int32_t>();
  const uint8_t* const m = reinterpret_cast<const uint8_t*>(whole.const_data_ptr<bool>());
  for_active(m, rows, columns, taps, [&](int64_t o, int64_t i, int64_t t) {
    ++s[segment(o, channel(o, i), t) + 1], ++b[back_segment(o, channel(o, i), t) + 1];
  });
  for (int64_t j = 0; j < segments; ++j) s[j + 1] += s[j];
  for (int64_t j = 0; j < back_segments; ++j) b[j + 1] += b[j];
  const int64_t nnz = s[segments];
  const auto list = [&] { return at::empty({nnz}, ints); };
  at::Tensor source = list(), index = list(), back_source = list(), back_order = list();
  int32_t* const c = source.mutable_data_ptr<int32_t>();
  int32_t* const n = index.mutable_data_ptr<int32_t>();
  int32_t* const d = back_source.mutable_data_ptr<int32_t>();
  int32_t* const e = back_order.mutable_data_ptr<int32_t>();
  std::vector<int32_t> next(s, s + segments), back_next(b, b + back_segments);
  for_active(m, rows, columns, taps, [&](int64_t o, int64_t i, int64_t t) {
    const int64_t read = channel(o, i);
    const int32_t k = next[segment(o, read, t)]++, j = back_next[back_segment(o, read, t)]++;
    c[k] = read * taps + t, n[k] = o * weight_strides[0] + i * weight_strides[1] + step[t];
    d[j] = o * taps + back[t], e[j] = k;
  });
  return {start, source, index, back_start, back_source, back_order};
}

// Calls `use(k, index[k])` for entries first..end. Entries stand in an order that memory is not in, so what they lie at is
// fetched ahead.
template <class T, class F>
void for_indexed(const int32_t* index, int64_t first, int64_t end, const T* memory, const F& use) {
  constexpr int64_t AHEAD = 48;
  int64_t k = first;
  for (; k + AHEAD < end; ++k) {
    __builtin_prefetch(memory + index[k + AHEAD]);
    use(k, index[k]);
  }
  for (; k < end; ++k) use(k, index[k]);
}

// Whether the true values of a mask, laid out as the weight, are just those at `index`.
inline bool has_entries(const at::Tensor& mask, const at::Tensor& index) {
  const uint8_t* const m = reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>());
  const int32_t* const n = index.const_data_ptr<int32_t>();
  const int64_t count = index.numel(), size = mask.numel();
  int64_t found = 0, here = 0;
  for_indexed(n, 0, count, m, [&](int64_t, int32_t at) { here += m[at]; });
  if (here != count) return false;
  constexpr int64_t PART = 4096;
  for (int64_t i = 0; i < size; i += PART) {
    uint32_t part = 0;
    for (int64_t j = i; j < std::min(i + PART, size); ++j) part += m[j];
    found += part;
  }
  return found == count;
}

inline at::Tensor gather_entries(const at::Tensor& weight, const at::Tensor& index) {
  const int64_t count = index.numel();
  at::Tensor values = at::empty({count}, weight.options().dtype(at::kFloat));
  const int32_t* const n = index.const_data_ptr<int32_t>();
  const float* const w = weight.const_data_ptr<float>();
  float* const v = values.mutable_data_ptr<float>();
  at::parallel_for(0, count, 32768, [&](int64_t begin, int64_t end) {
    for_indexed(n, begin, end, w, [&](int64_t k, int32_t at) { v[k] = w[at]; });
  });
  return values;
}

inline void put_entries(const at::Tensor& weight, const at::Tensor& index, const at::Tensor& values) {
  const int64_t count = index.numel();
  const int32_t* const n = index.const_data_ptr<int32_t>();
  const float* const v = values.const_data_ptr<float>();
  float* const w = weight.mutable_data_ptr<float>();
  at::parallel_for(0, count, 32768, [&](int64_t begin, int64_t end) {
    for_indexed(n, begin, end, w, [&](int64_t k, int32_t at) { w[at] = v[k]; });
  });
}

inline at::Tensor scatter_entries(const at::Tensor& values, const at::Tensor& index, at::IntArrayRef sizes,
                                  at::IntArrayRef strides) {
  at::Tensor weight = at::empty_strided(sizes, strides, values.options()).zero_();
  const int64_t count = index.numel();
  const int32_t* const n = index.const_data_ptr<int32_t>();
  const at::Tensor whole = values.contiguous();
  const float* const v = whole.const_data_ptr<float>();
  float* const w = weight.mutable_data_ptr<float>();
  at::parallel_for(0, count, 32768, [&](int64_t begin, int64_t end) {
    for_indexed(n, begin, end, w, [&](int64_t k, int32_t at) { w[at] = v[k]; });
  });
  return weight;
}

}  // namespace
