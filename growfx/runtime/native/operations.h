// The operations on single numbers, by their number in the file.

#pragma once

#include <cstdint>

namespace growfx_native {

// What is done to each number of a result. `X` stands for it, a and b for the two numbers of the operation.
enum class Op : uint8_t {
  ADD,           // X + operand
  MUL,           // X * operand
  SUB,           // X - operand
  RSUB,          // operand - X
  DIV,           // X / operand
  RDIV,          // operand / X
  MAXIMUM,       // NaN wins
  MINIMUM,
  SCALE,         // X * a + b
  CLAMP,         // a..b
  RELU,
  HARD_SIGMOID,
  HARD_SWISH,
  SIGMOID,
  SILU,
  TANH,
  GELU,          // exact
  GELU_TANH,
  LEAKY,         // X < 0 ? a * X : X
  ELU,           // X < 0 ? a * expm1(X) : b * X
  EXP,
  LOG,
  SQRT,
  RSQRT,
  RECIPROCAL,
  ABS,
  SQUARE,
  SOFTPLUS,
  MISH,
  POWER,         // X ^ a
  SIN,
  COS,
  ERF,
  GREATER,       // 1 or 0
  LESS,
  EQUAL,
  ROUND,
  FLOOR,
  GREATER_THAN,  // X > operand ? 1 : 0; no comparison with a NaN is true
  LESS_THAN,
  AT_LEAST,
  AT_MOST,
  EQUAL_TO,
  COUNT
};

// Of internal linkage: files that share it are compiled for other instructions.
static inline bool has_operand(Op op) { return op <= Op::MINIMUM || (op >= Op::GREATER_THAN && op < Op::COUNT); }

}  // namespace growfx_native
