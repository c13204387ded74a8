// Kernels for what every processor of the target has: SSE2, NEON or WebAssembly SIMD.

#include "kernels.h"
#include "operations.h"

#define GROWFX_LANES 4
#define GROWFX_NAME "baseline"
#define GROWFX_TABLE kernels_baseline
#include "kernels.inc"

namespace growfx_native {

const Kernels& kernels_here() {
#if defined(__x86_64__) && !defined(GROWFX_BASELINE_ONLY)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return kernels_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return kernels_baseline();
}

}  // namespace growfx_native
