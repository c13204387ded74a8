// What a file of a network holds: values, constants and steps in the order in which they run.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "operations.h"

namespace growfx_native {

constexpr int MAX_RANK = 8;
constexpr uint32_t NONE = UINT32_MAX;
// Elements of one value or constant.
constexpr int64_t MOST_ELEMENTS = INT32_MAX;

// A size that may grow with the batch.
struct Dim {
  int64_t per_batch = 0, fixed = 0;
};
using Shape = std::vector<Dim>;
using Sizes = std::vector<int64_t>;

// A tensor that every run computes. Values that are never needed at the same time share a slot.
struct Value {
  Shape shape;
  uint32_t slot = 0;
};

struct Constant {
  Sizes sizes;
  int64_t elements = 0;
  bool sparse = false;
  std::vector<uint32_t> positions;  // of sparse ones, ascending
  std::vector<float> values;        // all, or those at the positions
};

struct Post {
  Op op = Op::RELU;
  uint32_t operand = NONE;  // of the shape of the result
  float a = 0.0f, b = 0.0f;
};

struct Step {
  uint32_t kernel = 0;
  std::vector<uint32_t> inputs;  // values, then constants
  uint32_t output = 0;
  std::vector<int64_t> ints;
  std::vector<float> floats;
  std::vector<Post> post;
};

struct Network {
  std::vector<std::string> kernels;
  std::vector<Value> values;
  std::vector<Constant> constants;
  std::vector<Step> steps;
  std::vector<uint32_t> inputs, outputs;
  uint32_t slots = 0;
};

// Returns "" or what is wrong with the file. Ids, counts and streams are checked, shapes that depend on the batch are
// not.
std::string read_network(const uint8_t* data, size_t size, Network& network);

// The number of elements; -1 for a negative size, or more than MOST_ELEMENTS.
int64_t element_count(const Sizes& sizes);
// The sizes at a batch size; empty for shapes that it does not have (a rank of 0 has one size, 1).
bool resolve(const Shape& shape, int64_t batch, Sizes& sizes);

}  // namespace growfx_native
