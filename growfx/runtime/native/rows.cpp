#include "rows.h"

namespace growfx_native {

namespace {

constexpr double VALUE_BYTES = sizeof(float), ENTRY_BYTES = sizeof(float) + sizeof(int32_t);

enum ViewOp : int64_t { PERMUTE = 0, SLICE = 1, EXPAND = 2, FLIP = 3, INSERT = 4, DROP = 5, UNFOLD = 6 };

constexpr int64_t NOWHERE = -1;

// The one axis that grows with the batch, by whole rows; NOWHERE for a shape of another kind.
int64_t row_axis(const Shape& shape) {
  int64_t found = NOWHERE;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i].per_batch == 0) continue;
    if (found != NOWHERE || shape[i].per_batch < 0 || shape[i].fixed != 0) return NOWHERE;
    found = static_cast<int64_t>(i);
  }
  return found;
}

// How often the numbers of a row begin anew: the places before its axis.
int64_t pieces(const Shape& shape, int64_t axis) {
  Sizes before;
  return resolve(Shape(shape.begin(), shape.begin() + axis), 1, before) ? element_count(before) : -1;
}

bool is_fixed(const Shape& shape) {
  for (const Dim& dim : shape)
    if (dim.per_batch != 0) return false;
  return true;
}

// Elements that belong to one row of the batch; -1 for a shape that no batch has.
int64_t row_elements(const Shape& shape) {
  Sizes sizes;
  return resolve(shape, 1, sizes) ? element_count(sizes) : -1;
}

// Integers of a view, one operation after the other.
class Integers {
 public:
  explicit Integers(const std::vector<int64_t>& given) : given_(given) {}
  bool is_done() const { return at_ >= given_.size(); }
  int64_t next() { return is_done() ? -1 : given_[at_++]; }

 private:
  const std::vector<int64_t>& given_;
  size_t at_ = 0;
};

// The axis of rows after the permutation that the integers tell.
int64_t permuted(Integers& ints, int64_t rank, int64_t axis) {
  int64_t found = NOWHERE;
  for (int64_t i = 0; i < rank && !ints.is_done(); ++i)
    if (ints.next() == axis) found = i;
  return found;
}

// The axis of rows after a view, from where it was before; NOWHERE where rows do not stay whole and in their order.
// Where there were none, the rows that a view makes are all alike.
int64_t row_axis_after(const Step& step, int64_t rank, int64_t row) {
  Integers ints(step.ints);
  const bool is_new = row == NOWHERE;
  while (!ints.is_done()) {
    const int64_t op = ints.next();
    if (op == PERMUTE) {
      if (row != NOWHERE) row = permuted(ints, rank, row);
      else permuted(ints, rank, NOWHERE);
      if (row == NOWHERE && !is_new) return NOWHERE;
      continue;
    }
    const int64_t axis = ints.next();
    if (op == SLICE || op == UNFOLD) ints.next(), ints.next();
    const int64_t per_batch = op == SLICE || op == EXPAND ? ints.next() : 0;
    if (op == SLICE || op == EXPAND) ints.next();
    if (op == EXPAND && per_batch > 0) {
      if (row != NOWHERE) return NOWHERE;
      row = axis;
    } else if (per_batch != 0 || (axis == row && op != INSERT)) {
      return NOWHERE;
    } else if (op == INSERT) {
      ++rank;
      if (row != NOWHERE && axis <= row) ++row;
    } else if (op == DROP) {
      --rank;
      if (axis < row) --row;
    } else if (op == UNFOLD) {
      ++rank;
    }
  }
  return row;
}

class Rules {
 public:
  Rules(const Network& network, const std::vector<char>& once)
      : network_(network), once_(network.values.size(), 0), pieces_(network.slots, 1) {
    for (size_t i = 0; i < once.size(); ++i)
      if (once[i]) once_[network.steps[i].output] = 1;
  }

  // The steps in order.
  bool hold(const Step& step) {
    const Shape& out = shape(step.output);
    const int64_t row = row_axis(out);
    if (row == NOWHERE || step.inputs.empty() || row_elements(out) < 1) return false;
    for (const uint32_t id : step.inputs)
      if (!is_whole(id)) return false;
    for (const Post& post : step.post)
      if (post.operand != NONE && !(is_whole(post.operand) && has_places_of(post.operand, out))) return false;
    if (!holds(step, out, row)) return false;
    pieces_[network_.values[step.output].slot] = pieces(out, row);
    return true;
  }
  // Whether what lies in memory under a shape is the same rows as under that in which it was written.
  bool is_whole(uint32_t id) const {
    if (is_the_same_always(id)) return true;
    const int64_t row = row_axis(shape(id));
    return row != NOWHERE && pieces(shape(id), row) == pieces_[network_.values[id].slot];
  }

 private:
  bool holds(const Step& step, const Shape& out, int64_t row) const {
    const std::string& kernel = network_.kernels[step.kernel];
    const auto& ints = step.ints;
    const int64_t rank = static_cast<int64_t>(out.size());
    const uint32_t first = step.inputs[0];
    const auto int_at = [&](size_t i) { return i < ints.size() ? ints[i] : NOWHERE; };
    const auto like = [&](uint32_t id) { return is_like(id, out, row); };
    const auto broadcasts = [&](uint32_t id) { return is_broadcast(id, out, row); };
    if (kernel == "pointwise") return has_places_of(first, out);
    if (kernel == "binary" || kernel == "select") return all(step, 0, broadcasts);
    if (kernel == "concat") return int_at(0) >= 0 && int_at(0) != row && all(step, 0, like);
    if (kernel == "view") {
      const int64_t from = is_the_same_always(first) ? NOWHERE : row_axis(shape(first));
      if (from == NOWHERE) return is_the_same_always(first) && row_axis_after(step, rank_of(first), NOWHERE) == row;
      const bool as_many = shape(first)[static_cast<size_t>(from)].per_batch == out[static_cast<size_t>(row)].per_batch;
      return as_many && row_axis_after(step, rank_of(first), from) == row;
    }
    if (!like(first)) return false;
    if (kernel == "attention")
      return row < rank - 2 && step.inputs.size() >= 3 && like(step.inputs[1]) && like(step.inputs[2]) &&
             all(step, 3, broadcasts);
    if (kernel == "product") return row < rank - 2 && all(step, 1, like);
    if (kernel == "gated_convolution") return row == 0 && step.inputs.size() >= 3 && like(step.inputs[2]);
    if (!all(step, 1, [&](uint32_t id) { return is_the_same_always(id); })) return false;
    if (kernel == "convolution" || kernel == "deconvolution" || kernel == "group_norm") return row == 0;
    if (kernel == "linear") return row < rank - 1;
    if (kernel == "pool" || kernel == "layer_norm") return int_at(0) >= 1 && int_at(0) < rank - row;
    if (kernel == "reduce") return int_at(1) > row;
    return kernel == "softmax" && int_at(0) >= 0 && int_at(0) != row;
  }

  bool is_constant(uint32_t id) const { return id >= network_.values.size(); }
  const Shape& shape(uint32_t id) const { return network_.values[id].shape; }
  int64_t rank_of(uint32_t id) const {
    return static_cast<int64_t>(is_constant(id) ? constant(id).sizes.size() : shape(id).size());
  }
  const Constant& constant(uint32_t id) const { return network_.constants[id - network_.values.size()]; }
  bool is_the_same_always(uint32_t id) const { return is_constant(id) || (once_[id] && is_fixed(shape(id))); }
  // As many numbers for each row as the output, in the same places.
  bool has_places_of(uint32_t id, const Shape& out) const {
    return !is_the_same_always(id) && row_elements(shape(id)) == row_elements(out) &&
           pieces(shape(id), row_axis(shape(id))) == pieces(out, row_axis(out));
  }
  // The same axis of rows.
  bool is_like(uint32_t id, const Shape& out, int64_t row) const {
    const size_t at = static_cast<size_t>(row);
    return !is_the_same_always(id) && row_axis(shape(id)) == row && shape(id)[at].per_batch == out[at].per_batch;
  }
  // The same axis of rows, or none.
  bool is_broadcast(uint32_t id, const Shape& out, int64_t row) const {
    const int64_t missing = static_cast<int64_t>(out.size()) - rank_of(id);
    if (!is_the_same_always(id)) return missing == 0 && is_like(id, out, row);
    if (missing > row) return true;
    const size_t at = static_cast<size_t>(row - missing);
    return missing >= 0 && (is_constant(id) ? constant(id).sizes[at] : shape(id)[at].fixed) == 1;
  }
  template <class F>
  static bool all(const Step& step, size_t from, const F& holds) {
    for (size_t i = from; i < step.inputs.size(); ++i)
      if (!holds(step.inputs[i])) return false;
    return true;
  }

  const Network& network_;
  std::vector<char> once_;       // by value
  std::vector<int64_t> pieces_;  // of what was last written to a slot
};

}  // namespace

bool is_by_rows(const Network& network, const std::vector<char>& once) {
  for (const auto& ids : {network.inputs, network.outputs})
    for (const uint32_t id : ids)
      if (row_axis(network.values[id].shape) != 0) return false;
  Rules rules(network, once);
  for (size_t i = 0; i < network.steps.size(); ++i) {
    const bool fixed = once[i] && is_fixed(network.values[network.steps[i].output].shape);
    if (!fixed && !rules.hold(network.steps[i])) return false;
  }
  for (const uint32_t id : network.outputs)
    if (!rules.is_whole(id)) return false;
  return true;
}

bool is_light(const Network& network) {
  double weights = 0, activations = 0;
  for (const Constant& c : network.constants)
    weights += c.sparse ? ENTRY_BYTES * static_cast<double>(c.positions.size())
                        : VALUE_BYTES * static_cast<double>(c.elements);
  for (const Step& step : network.steps)  // written once, and read once
    activations += 2 * VALUE_BYTES * static_cast<double>(row_elements(network.values[step.output].shape));
  return weights <= activations;
}

}  // namespace growfx_native
