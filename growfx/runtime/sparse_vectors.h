// Vectors of floats in the widest registers that the compiler was told of, by the extensions of GCC and Clang.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using Lanes = std::make_integer_sequence<int, LANES>;
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float LooseVector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const LooseVector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<LooseVector*>(p) = v; }
inline Vector load(const c10::BFloat16* p) {
  const Halves halves = *reinterpret_cast<const LooseHalves*>(p);
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}
inline void store(c10::BFloat16* p, Vector v) {
  const Words bits = (Words)v;
  const Words even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;  // rounding could carry a NaN over into zero
  const Words is_nan = (Words)(v != v);
  *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector((is_nan & quiet) | (~is_nan & even), Halves);
}
// Two vectors in a row, read in the order I.
template <int... I>
inline Vector picked(Vector a, Vector b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int Order __attribute__((vector_size(LANES * 4)));
  return __builtin_shuffle(a, b, Order{I...});
#endif
}
template <int... I>
inline Vector every_second(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return picked(a, b, std::integer_sequence<int, (2 * I)...>{});
}
inline Vector every_second(Vector a, Vector b) { return every_second(a, b, Lanes{}); }
// a0 b0 a1 b1 ..., from the value `FROM` on.
template <int FROM, int... I>
inline Vector merged(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return picked(a, b, std::integer_sequence<int, (FROM + I / 2 + I % 2 * LANES)...>{});
}
// LANES vectors of LANES values: merging halves log2(LANES) times exchanges rows and columns.
inline void transpose(Vector (&v)[LANES]) {
  for (int step = 1; step < LANES; step *= 2) {
    Vector next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = merged<0>(v[i], v[i + LANES / 2], Lanes{});
      next[2 * i + 1] = merged<LANES / 2>(v[i], v[i + LANES / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = next[i];
  }
}
// A NaN is not below zero and stays.
inline Vector rectified(Vector v) { return v < 0.0f ? Vector{} : v; }

}  // namespace
