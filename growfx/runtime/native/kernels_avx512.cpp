// Kernels for x86-64 with AVX-512; empty elsewhere. No flag of the compiler says so: the pragmas do.

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses from one set of instructions to another

#include "kernels.h"
#include "operations.h"

#if defined(__x86_64__) && !defined(GROWFX_BASELINE_ONLY)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx2,fma")
#endif

#define GROWFX_LANES 16
#define GROWFX_NAME "avx512"
#define GROWFX_TABLE kernels_avx512
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
