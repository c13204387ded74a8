// Constant weights as rows of products.

#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "network.h"

namespace growfx_native {

// What a row costs besides its entries, in entries.
constexpr int64_t ROW_COST = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A constant weight (O, I, ...) as the products want it; offsets come later.
struct Weight {
  std::vector<uint32_t> start;  // empty for a dense one
  std::vector<int32_t> offset;
  std::vector<int32_t> share_start;
  int64_t rows = 0, columns = 0;

  void pack(const Constant& c, int64_t row_count) {
    rows = row_count;
    columns = c.elements / row_count;
    if (!c.sparse) return;
    start.assign(static_cast<size_t>(rows) + 1, 0);
    for (const uint32_t p : c.positions) ++start[p / static_cast<uint64_t>(columns) + 1];
    for (int64_t o = 0; o < rows; ++o) start[o + 1] += start[o];
  }
  int64_t entries(int64_t o) const { return start.empty() ? columns : start[o + 1] - start[o]; }
  // Output channels of equal cost.
  void share(int64_t shares) {
    int64_t total = 0, done = 0;
    for (int64_t o = 0; o < rows; ++o) total += entries(o) + ROW_COST;
    share_start.assign(1, 0);
    for (int64_t o = 0; o < rows; ++o) {
      done += entries(o) + ROW_COST;
      while (static_cast<int64_t>(share_start.size()) < shares &&
             done >= total * static_cast<int64_t>(share_start.size()) / shares)
        share_start.push_back(static_cast<int32_t>(o + 1));
    }
    while (static_cast<int64_t>(share_start.size()) <= shares) share_start.push_back(static_cast<int32_t>(rows));
    share_start[static_cast<size_t>(shares)] = static_cast<int32_t>(rows);
  }
  Rows view(const Constant& c, const float* bias) const {
    Rows view{};
    view.start = start.empty() ? nullptr : start.data(), view.offset = offset.data(), view.value = c.values.data();
    view.depth = view.row_stride = columns, view.column_stride = 1, view.bias = bias;
    return view;
  }
};

// Rows in blocks of columns. A copy of few columns stays in the first cache, one of some more in the second; where
// rows have few entries, in so short a block it is not worth to begin.
class Blocks {
 public:
  // Entries of the rows of one group, each with the number of its column, and where columns are.
  void build_sparse(const Weight& weight, const Constant& constant, int64_t first_row, int64_t row_count,
                    const std::vector<int32_t>& column_of, const std::vector<int32_t>& offset_of, int64_t tile) {
    const size_t from = weight.start[static_cast<size_t>(first_row)];
    const size_t end = weight.start[static_cast<size_t>(first_row + row_count)];
    number_columns(column_of, offset_of, from, end);
    place_entries(weight, constant, first_row, row_count, column_of, tile);
  }
  // Sparse rows whose columns stand side by side, `row` floats each: there is nothing to copy.
  void build_placed(const Weight& weight, const Constant& constant, int64_t row) {
    is_placed_ = true;
    std::vector<int32_t> column_of;
    for (const uint32_t p : constant.positions) column_of.push_back(static_cast<int32_t>(p % weight.columns));
    for (int64_t c = 0; c < weight.columns; ++c) {
      number_.push_back(static_cast<int32_t>(c));
      column_.push_back(static_cast<int32_t>(c * row));
    }
    place_entries(weight, constant, 0, weight.rows, column_of, row);
  }
  // Dense rows, whose columns are at `offsets`.
  void build_dense(const std::vector<int32_t>& offsets, int64_t row_count, int64_t tile) {
    if (row_count < LEAST_USES) return;
    column_ = offsets;
    for (size_t i = 0; i < offsets.size(); ++i) channel_.push_back(static_cast<int32_t>(i));
    split(static_cast<int64_t>(offsets.size()), DENSE_COLUMNS);
    for (int64_t i = 0; i < block_; ++i) offset_.push_back(static_cast<int32_t>(i * tile));
    is_built_ = true;
  }
  // `whole` where there are no blocks.
  Rows view(const Rows& whole, int64_t first_row, int64_t row_count, int64_t tile) const {
    if (!is_built_) return whole;
    Rows view = whole;
    view.offset = offset_.data();
    if (whole.start) view.start = start_.data(), view.value = value_.data();
    view.blocks = blocks(), view.block_start = block_start_.data(), view.column = column_.data();
    view.channel = channel_.data();
    view.first_row = first_row, view.row_count = row_count;
    const int64_t together = blocks() > 1 ? 1 : std::max<int64_t>(FIRST_CACHE / (block_ * tile), 1);
    view.packed = is_placed_ ? 0 : together * block_ * tile;
    return view;
  }

 private:
  static constexpr int64_t LEAST_USES = 4, ENTRIES_A_BLOCK = 12, FEWEST_COLUMNS = 64, MOST_COLUMNS = 512;
  static constexpr int64_t DENSE_COLUMNS = 256;
  // Floats of the copies of several tiles.
  static constexpr int64_t FIRST_CACHE = int64_t{8} << 10;

  int64_t blocks() const { return static_cast<int64_t>(block_start_.size()) - 1; }
  int64_t block_of(int32_t column) const { return column / block_; }
  template <class F>
  static void each_entry(const Weight& weight, int64_t first_row, int64_t row_count, const F& function) {
    for (int64_t row = first_row; row < first_row + row_count; ++row)
      for (size_t i = weight.start[static_cast<size_t>(row)]; i < weight.start[static_cast<size_t>(row) + 1]; ++i)
        function(row, i);
  }
  void place_entries(const Weight& weight, const Constant& constant, int64_t first_row, int64_t row_count,
                     const std::vector<int32_t>& column_of, int64_t tile) {
    const size_t from = weight.start[static_cast<size_t>(first_row)];
    const size_t end = weight.start[static_cast<size_t>(first_row + row_count)];
    const int64_t columns = static_cast<int64_t>(column_.size()), entries = static_cast<int64_t>(end - from);
    if (entries < LEAST_USES * columns || entries == 0) return;
    split(columns, std::clamp(ENTRIES_A_BLOCK * columns * row_count / entries, FEWEST_COLUMNS, MOST_COLUMNS));
    start_.assign(static_cast<size_t>(blocks() * row_count) + 1, 0);
    const auto place = [&](int64_t row, size_t i) {
      return static_cast<size_t>(block_of(number_[static_cast<size_t>(column_of[i])]) * row_count + row - first_row);
    };
    each_entry(weight, first_row, row_count, [&](int64_t row, size_t i) { ++start_[place(row, i) + 1]; });
    for (size_t i = 1; i < start_.size(); ++i) start_[i] += start_[i - 1];
    std::vector<uint32_t> next(start_.begin(), start_.end() - 1);
    offset_.resize(end - from), value_.resize(end - from);
    each_entry(weight, first_row, row_count, [&](int64_t row, size_t i) {
      const uint32_t to = next[place(row, i)]++;
      const int32_t column = number_[static_cast<size_t>(column_of[i])];
      offset_[to] = static_cast<int32_t>((column - block_start_[static_cast<size_t>(block_of(column))]) * tile);
      value_[to] = constant.values[i];
    });
    number_ = {};
    is_built_ = true;
  }
  // Columns that have an entry, in their order.
  void number_columns(const std::vector<int32_t>& column_of, const std::vector<int32_t>& offset_of, size_t from,
                      size_t end) {
    number_.assign(offset_of.size(), -1);
    for (size_t i = from; i < end; ++i) number_[static_cast<size_t>(column_of[i])] = 0;
    for (size_t c = 0; c < number_.size(); ++c) {
      if (number_[c] < 0) continue;
      number_[c] = static_cast<int32_t>(column_.size());
      column_.push_back(offset_of[c]);
      channel_.push_back(static_cast<int32_t>(c));
    }
  }
  void split(int64_t columns, int64_t most) {
    const int64_t count = ceil_div(columns, most);
    block_ = ceil_div(columns, count);
    for (int64_t c = 0; c < columns; c += block_) block_start_.push_back(static_cast<int32_t>(c));
    block_start_.push_back(static_cast<int32_t>(columns));
  }

  bool is_built_ = false, is_placed_ = false;
  int64_t block_ = 1;  // columns of one
  std::vector<int32_t> number_, column_, channel_, block_start_, offset_;
  std::vector<uint32_t> start_;
  std::vector<float> value_;
};

}  // namespace growfx_native
