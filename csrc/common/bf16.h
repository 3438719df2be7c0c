// SPDX-License-Identifier: Apache-2.0
// bfloat16 values in pairs, two in a 32-bit lane, as the instructions of AVX512_BF16 (bf16_dot.h)
// and AMX_BF16 (bf16_tiles.h) multiply them; and the exponential of AVX-512.
//
// Legend: D width, NR lanes of a panel. A Pair holds two values that are multiplied with the two of
// another pair; sums are float32.
#pragma once

#include "convert.h"
#include "gemm.h"

// Intrinsics must be compiled for their instructions. The pragma also reaches lambdas, which a
// target attribute does not.
#if defined(__x86_64__)
#define FASTREC_BF16 1
// gcc 12 takes the "undefined" operands of its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fastrec {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace bf16 {

using Pair = uint32_t;
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
// Twice the stationary rows of the float32 kernels: a streamed tile is rounded and interleaved once
// per block, and the products take half the time.
constexpr int64_t BLOCK = 2 * fastrec::BLOCK;
constexpr int64_t NV = 2, LANES = 16, NR = NV * LANES;
static_assert(BLOCK % NR == 0 && TILE % 2 == 0, "whole tiles");

FASTREC_INLINE int64_t pairs_of(int64_t n) { return (n + 1) / 2; }
// Row strides, in pairs: of rows that pair neighbours along D, and of rows that pair with the next
// row. The latter may be read a whole register tile beyond the width.
FASTREC_INLINE int64_t row_stride(int64_t width) { return round_up(pairs_of(width), LANES) + LANES; }
FASTREC_INLINE int64_t column_stride(int64_t width) { return round_up(width, LANES) + LANES; }

// 2^t for t <= 0 (a little above is fine) by 2^f, f = t - floor(t): relative error 1.6e-7, minimax
// on [0, 1] with 2^0 = 1. 2^-inf = 0, NaN stays NaN.
FASTREC_INLINE __m512 exp2(__m512 t) {
  __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(0.0018671330763f);
  for (float c : {0.00901702418923f, 0.0557999163866f, 0.240164443851f, 0.693151295185f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, t);  // by 2^floor(t)
}
constexpr float LOG2E = 1.44269504089f;

// Lane i: (bf16(low[i]), bf16(high[i])).
FASTREC_INLINE __m512i pair(__m512 low, __m512 high) {
  const __m512i interleave = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
      23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

FASTREC_INLINE void set(Pair& pair, int64_t half, float value) {
  BFloat16 rounded(value);
  reinterpret_cast<uint16_t*>(&pair)[half] = rounded.x;
}
FASTREC_INLINE float get(Pair pair, int64_t half) {
  return from_bits(half ? pair & 0xffff0000u : pair << 16);
}

// One row as pairs along D, rounded to bfloat16; zeros up to a whole vector.
FASTREC_INLINE void load_row(const Rows& rows, int64_t row, int64_t width, Pair* out) {
  const char* source = rows.data + row * rows.stride;
  for (int64_t k = 0; k < width; k += NR, out += LANES) {
    int64_t left = std::min(NR, width - k);
    __mmask32 mask = left == NR ? ~0u : (1u << left) - 1;
    if (rows.dtype == ScalarType::BFloat16) {
      _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask, source + 2 * k));
    } else {
      const char* at = source + 4 * k;
      __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), at);
      __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> LANES), at + 64);
      _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// Rows a and b, pairs along D, as pairs (a[d], b[d]).
FASTREC_INLINE void interleave(const Pair* a, const Pair* b, int64_t width, Pair* out) {
  for (int64_t k = 0; k < width; k += LANES) {
    Halves low, high;
    std::memcpy(&low, a + k / 2, sizeof(low));
    std::memcpy(&high, b + k / 2, sizeof(high));
    Words words = __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
    std::memcpy(out + k, &words, sizeof(words));
  }
}

// [rows, ld] pairs along D -> panels [D / 2, NR]; lanes beyond `rows` are 0.
FASTREC_INLINE void pack_transposed(int64_t rows, int64_t pairs, const Pair* source, int64_t ld,
                                    Pair* panels) {
  for (int64_t s = 0; s < rows; s += NR, panels += pairs * NR) {
    for (int64_t r = 0; r < NR; ++r) {
      for (int64_t k = 0; k < pairs; ++k)
        panels[k * NR + r] = s + r < rows ? source[(s + r) * ld + k] : 0;
    }
  }
}

}  // namespace bf16
#pragma GCC pop_options
}  // namespace fastrec
#endif
