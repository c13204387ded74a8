// Kernels for x86-64 with AVX2 and fused multiply-add; empty elsewhere. No flag of the compiler says so: the pragmas do.

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses from one set of instructions to another

#include "kernels.h"
#include "operations.h"

#if defined(__x86_64__) && !defined(GROWFX_BASELINE_ONLY)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define GROWFX_LANES 8
#define GROWFX_NAME "avx2"
#define GROWFX_TABLE kernels_avx2
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
