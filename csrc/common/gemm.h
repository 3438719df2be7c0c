// SPDX-License-Identifier: Apache-2.0
// Register-tiled matrix products of a tile that streams by and a block that stays.
//
// Legend: D width, S = BLOCK stationary rows, T = TILE streamed rows, MR x NR register tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd.h"

namespace fastrec {

constexpr int64_t BLOCK = 96;  // a multiple of every MR and NR below, for float and for double
constexpr int64_t TILE = 192;  // a multiple of every MR
constexpr int64_t DEPTH = 128;

FASTREC_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
// Row stride of a padded [rows, width] buffer: whole 64-byte lines plus one, so that a power-of-two
// width does not map all rows to the same cache sets.
template <class T>
FASTREC_INLINE int64_t padded(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return round_up(width, line) + line;
}

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    data_.reset(static_cast<T*>(std::aligned_alloc(64, round_up(n * sizeof(T) + 1, 64))));
    if (!data_) throw std::bad_alloc();
  }
  // For scores: `accumulate` multiplies whole register tiles, also lanes that no score was written
  // to. The result is dropped, but memory that held small integers is full of denormals, and a Xeon
  // takes a hundred cycles for each: docs/log/linear_cross_entropy.md.
  Buffer(int64_t n, T fill) : Buffer(n) { std::fill_n(data_.get(), n, fill); }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

template <class S>
struct Gemm {
  using T = typename S::T;
  using V = typename S::V;
  // 16 registers: 6 x 2 accumulators + 2 vectors of b + 1 broadcast; 32 registers: 12 x 2. Per step
  // of the depth that is 12 (24) FMAs for 8 (14) loads, and an FMA latency of 4 at 2 per cycle
  // needs 8 in flight.
  static constexpr int MR = sizeof(V) == 64 ? 12 : 6;
  static constexpr int NV = 2;
  static constexpr int NR = NV * S::lanes;
  static_assert(BLOCK % MR == 0 && BLOCK % NR == 0 && TILE % MR == 0, "whole register tiles");

  // c[i][j] += sum_k a[i * a_row + k * a_step] * b[k * b_step + j * lanes ...]
  template <int N>
  static FASTREC_INLINE void multiply(int64_t depth, const T* a, int64_t a_row, int64_t a_step,
                                      const T* b, int64_t b_step, V (&c)[MR][N]) {
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
      V bv[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) bv[j] = S::load(b + j * S::lanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) c[i][j] += a[i * a_row] * bv[j];
      }
    }
  }

  // out[t, lanes of a panel] = tile[t] . panel, where out has row stride STRIDE, panel is [D, NR].
  // Up to MR - 1 rows beyond `rows` are computed too. Sums are cut every DEPTH terms, because the
  // rounding error grows with the length of a chain.
  template <int64_t STRIDE = BLOCK>
  static FASTREC_INLINE void scores(int64_t rows, int64_t width, const T* tile, int64_t ld,
                                    const T* panel, T* out) {
    for (int64_t i = 0; i < rows; i += MR) {
      for (int64_t k = 0; k < width; k += DEPTH) {
        V c[MR][NV] = {};
        multiply<NV>(std::min(DEPTH, width - k), tile + i * ld + k, ld, 1, panel + k * NR, NR, c);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            T* at = out + (i + m) * STRIDE + j * S::lanes;
            S::store(at, k > 0 ? S::load(at) + c[m][j] : c[m][j]);
          }
        }
      }
    }
  }

  template <int N, int64_t ROW, int64_t STEP>
  static FASTREC_INLINE void accumulate_tile(int64_t depth, const T* p, const T* tile, int64_t ld,
                                             T* out, int64_t out_ld) {
    V c[MR][N] = {};
    multiply<N>(depth, p, ROW, STEP, tile, ld, c);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        T* at = out + m * out_ld + j * S::lanes;
        S::store(at, S::load(at) + c[m][j]);  // one rounding per tile, not per streamed row
      }
    }
  }

  // out[s] += sum_t p(s, t) * tile[t] for `stationary` rows s and `depth` streamed rows t, where
  // p(s, t) is at s * ROW + t * STEP.
  template <int64_t ROW = 1, int64_t STEP = BLOCK>
  static FASTREC_INLINE void accumulate(int64_t stationary, int64_t depth, int64_t width,
                                        const T* p, const T* tile, int64_t ld, T* out,
                                        int64_t out_ld) {
    for (int64_t n = 0; n < width; n += NR) {
      for (int64_t s = 0; s < stationary; s += MR) {
        T* at = out + s * out_ld + n;
        if (width - n > S::lanes)
          accumulate_tile<NV, ROW, STEP>(depth, p + s * ROW, tile + n, ld, at, out_ld);
        else
          accumulate_tile<1, ROW, STEP>(depth, p + s * ROW, tile + n, ld, at, out_ld);
      }
    }
  }

  // [rows, D] with stride ld -> panels [D, NR]; lanes beyond `rows` are 0.
  static FASTREC_INLINE void pack_transposed(int64_t rows, int64_t width, const T* source,
                                             int64_t ld, T* panels) {
    for (int64_t s = 0; s < rows; s += NR, panels += width * NR) {
      for (int64_t r = 0; r < NR; ++r) {
        if (s + r < rows) {
          for (int64_t k = 0; k < width; ++k) panels[k * NR + r] = source[(s + r) * ld + k];
        } else {
          for (int64_t k = 0; k < width; ++k) panels[k * NR + r] = T(0);
        }
      }
    }
  }
};

}  // namespace fastrec
