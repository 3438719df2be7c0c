// SPDX-License-Identifier: Apache-2.0
// Which instructions multiply bfloat16 values in this process.
#pragma once

#include <cstdlib>
#include <cstring>

#include "simd.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrec {

// none: they are widened to float32. dot: vdpbf16ps. tiles: AMX_BF16.
enum class Bf16 { none, dot, tiles };

// Whether the processor has tiles and Linux lets this process use them. It is asked, because a
// thread that uses them has 8 KB more to save.
inline bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool has = __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, request, tile_data) == 0;
  return has;
#else
  return false;
#endif
}

// The best of this processor, or what FASTREC_CPU_CAPABILITY says: "avx512" is without both. On
// Intel vdpbf16ps makes half the multiply-adds of float32 a cycle, on AMD twice as many
// (docs/kernels/linear_cross_entropy.md).
inline Bf16 bf16_products() {
#if defined(__x86_64__)
  static const Bf16 products = [] {
    const char* asked = std::getenv("FASTREC_CPU_CAPABILITY");
    const bool best = asked == nullptr || *asked == 0 || std::strcmp(asked, "amx") == 0;
    if (vector_bytes() < 64 || !__builtin_cpu_supports("avx512bf16")) return Bf16::none;
    if (best) return has_tiles() ? Bf16::tiles : __builtin_cpu_is("intel") ? Bf16::none : Bf16::dot;
    return std::strcmp(asked, "avx512_bf16") == 0 ? Bf16::dot : Bf16::none;
  }();
  return products;
#else
  return Bf16::none;
#endif
}

}  // namespace fastrec
