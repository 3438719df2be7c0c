// SPDX-License-Identifier: Apache-2.0
// The products of linear_cross_entropy_bf16.h by vdpbf16ps of AVX512_BF16.
//
// Legend: D width, S stationary rows, MR x NR register tile.
#pragma once

#include "bf16.h"

#ifdef FASTREC_BF16
namespace fastrec {
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace bf16 {

constexpr int64_t MR = 12;
static_assert(BLOCK % MR == 0 && TILE % MR == 0, "whole tiles");

// c[i][j] += sum_k a[i * a_row + k * a_step] . b[k * b_step + j * LANES ...]
template <int N>
FASTREC_INLINE void multiply(int64_t depth, const Pair* a, int64_t a_row, int64_t a_step,
                             const Pair* b, int64_t b_step, __m512 (&c)[MR][N]) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    __m512bh bv[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      __m512bh av = (__m512bh)_mm512_set1_epi32(a[i * a_row]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], av, bv[j]);
    }
  }
}

template <int N>
FASTREC_INLINE void accumulate_tile(int64_t depth, const Pair* p, const Pair* tile, int64_t ld,
                                    float* out, int64_t out_ld) {
  __m512 c[MR][N] = {};
  multiply<N>(depth, p, 1, BLOCK, tile, ld, c);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      float* at = out + m * out_ld + j * LANES;
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), c[m][j]));
    }
  }
}

struct Dot {
  struct Scope {};  // nothing is set up for a thread
  static constexpr int64_t STEP = MR;  // rows that are computed at a time

  // Pairs along D that `scores` reads.
  static FASTREC_INLINE int64_t depth(int64_t width) { return pairs_of(width); }

  // Streamed rows in the two orders that the products read.
  class Streamed {
   public:
    Streamed(int64_t rows, int64_t width)
        : width(width), ld(row_stride(width)), column_ld(column_stride(width)),
          rows((rows + STEP) * ld, 0), columns(pairs_of(rows) * column_ld, 0) {}
    FASTREC_INLINE void load(const Rows& source, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) load_row(source, first + i, width, rows + i * ld);
      if (count % 2) std::fill_n(rows + count * ld, ld, 0);
      for (int64_t i = 0; i < count; i += 2)
        interleave(row(i), row(i + 1), width, columns + i / 2 * column_ld);
    }
    const Pair* row(int64_t i) const { return rows + i * ld; }
    // For `Sums::accumulate`, of an even row.
    const Pair* second(int64_t i) const { return columns + i / 2 * column_ld; }
    int64_t row_ld() const { return ld; }

   private:
    int64_t width, ld, column_ld;
    Buffer<Pair> rows;     // [rows + a register tile, ld]: pairs along D
    Buffer<Pair> columns;  // [rows / 2, column_ld]: pairs with the next row
  };

  // out[t, lanes of a panel] = tile[t] . panel; tile [rows, ld] pairs along D, panel [depth, NR],
  // out [rows, NR]. Up to STEP - 1 rows beyond `rows` are computed too.
  static FASTREC_INLINE void scores(int64_t rows, int64_t pairs, const Pair* tile, int64_t ld,
                                    const Pair* panel, float* out) {
    for (int64_t i = 0; i < rows; i += MR) {
      __m512 c[MR][NV] = {};
      multiply<NV>(pairs, tile + i * ld, ld, 1, panel, NR, c);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) _mm512_storeu_ps(out + (i + m) * NR + j * LANES, c[m][j]);
      }
    }
  }

  // Sums [S, D] of products of p and streamed rows.
  class Sums {
   public:
    explicit Sums(int64_t width)
        : width(width), ld(padded<float>(width)), column_ld(column_stride(width)),
          at(BLOCK * ld) {}
    FASTREC_INLINE void clear() { std::fill_n(static_cast<float*>(at), BLOCK * ld, 0.0f); }
    FASTREC_INLINE void scale(const float* factor) {
      for (int64_t s = 0; s < BLOCK; ++s) {
        if (factor[s] == 1) continue;
        for (int64_t d = 0; d < width; ++d) at[s * ld + d] *= factor[s];
      }
    }
    FASTREC_INLINE void add(int64_t s, int64_t d, float value) { at[s * ld + d] += value; }
    // += sum_t p(t, s) . row t, over `depth` pairs t of streamed rows; p [TILE / 2, BLOCK], of
    // which the rows behind `depth` may be overwritten.
    FASTREC_INLINE void accumulate(int64_t stationary, int64_t depth, Pair* p, const Pair* second) {
      for (int64_t n = 0; n < width; n += NR) {
        for (int64_t s = 0; s < stationary; s += MR) {
          float* out = at + s * ld + n;
          if (width - n > LANES)
            accumulate_tile<NV>(depth, p + s, second + n, column_ld, out, ld);
          else
            accumulate_tile<1>(depth, p + s, second + n, column_ld, out, ld);
        }
      }
    }
    FASTREC_INLINE void finish() {}
    // [D], behind `finish`.
    const float* row(int64_t s) const { return at + s * ld; }

   private:
    int64_t width, ld, column_ld;
    Buffer<float> at;  // [BLOCK, ld]
  };
};

}  // namespace bf16
#pragma GCC pop_options
}  // namespace fastrec
#endif
