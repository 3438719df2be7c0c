// SPDX-License-Identifier: Apache-2.0
// Products of small matrices (a few to a few hundred rows) and the packing that they need.
//
// Legend: R rows of c, K depth, N columns of c.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace fastrec {

// c[i, j] (+)= scale[i] * sum_k a[i, k] b[k, j], with element (i, k) of a at a[i * a_row + k * a_step]
// and scale[i] at scale[i * scale_step]. b is cut into panels of `SmallGemm::NR` columns, b_panel
// elements apart (NR where rows are stored as they are). With `bias` that vector is added to every
// row. Columns are computed in whole vectors: rows of b and c, and bias, extend to the next multiple
// of the lanes.
template <class T>
struct ProductArgs {
  int64_t rows, depth, columns;
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_row, b_panel;
  T* c;
  int64_t c_row;
  const T* scale;
  int64_t scale_step;
  bool add;
  const T* bias;
};

template <class S>
struct SmallGemm {
  using T = typename S::T;
  using V = typename S::V;
  // Accumulators of a tile: 12 of 16 registers, 24 of 32. A panel of one vector takes twice the
  // rows, because an FMA of 4 cycles at 2 per cycle needs 8 independent sums.
  static constexpr int MR = sizeof(V) == 64 ? 12 : 6;
  static constexpr int NV = 2;
  static constexpr int NR = NV * S::lanes;
  static constexpr int64_t DEPTH = 128;  // a longer chain of additions is cut, for its rounding

  template <int R, int N>
  static FASTREC_INLINE void tile(const ProductArgs<T>& p, int64_t row, int64_t column,
                                  int64_t first, int64_t depth) {
    const T* a = p.a + row * p.a_row + first * p.a_step;
    const T* b = p.b + column / NR * p.b_panel + column % NR + first * p.b_row;
    const int64_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
    V c[R][N] = {};
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
      V bv[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) bv[j] = S::load(b + j * S::lanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) c[i][j] += a[i * a_row] * bv[j];
      }
    }
    T* out = p.c + row * p.c_row + column;
    const bool add = p.add || first > 0;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const T scale = p.scale[(row + i) * p.scale_step];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        T* at = out + i * p.c_row + j * S::lanes;
        V value = c[i][j] * scale;
        if (p.bias && first == 0) value += S::load(p.bias + column + j * S::lanes);
        S::store(at, add ? S::load(at) + value : value);
      }
    }
  }

  // tile<R, N> for the R in [1, MOST] that is asked for.
  template <int N, int MOST>
  static FASTREC_INLINE void tile_of(int64_t count, const ProductArgs<T>& p, int64_t row,
                                     int64_t column, int64_t first, int64_t depth) {
    if (count == MOST) return tile<MOST, N>(p, row, column, first, depth);
    if constexpr (MOST > 1) tile_of<N, MOST - 1>(count, p, row, column, first, depth);
  }

  template <int N, int MOST>
  static FASTREC_INLINE void panel(const ProductArgs<T>& p, int64_t column, int64_t first,
                                   int64_t depth) {
    // Nearly equal blocks: 9 rows are 5 + 4, not 6 + 3.
    int64_t blocks = (p.rows + MOST - 1) / MOST;
    for (int64_t row = 0; blocks > 0; --blocks) {
      int64_t count = (p.rows - row + blocks - 1) / blocks;
      tile_of<N, MOST>(count, p, row, column, first, depth);
      row += count;
    }
  }

  static FASTREC_INLINE void run(const ProductArgs<T>& p) {
    for (int64_t first = 0; first < p.depth; first += DEPTH) {
      int64_t depth = std::min(DEPTH, p.depth - first);
      for (int64_t column = 0; column < p.columns; column += NR) {
        if (p.columns - column > S::lanes)
          panel<NV, MR>(p, column, first, depth);
        else
          panel<1, 12>(p, column, first, depth);
      }
    }
  }
};

template <class S>
FASTREC_INLINE void product_body(const ProductArgs<typename S::T>& p) {
  SmallGemm<S>::run(p);
}
FASTREC_DEFINE_PER_ISA(product_any, ProductArgs, product_body)

// The product on the instruction set of S, as a call: one copy of its many tiles per set.
template <class S>
FASTREC_INLINE void product(const ProductArgs<typename S::T>& p) {
#if defined(__x86_64__)
  if constexpr (sizeof(typename S::V) == 64)
    product_any_v4<typename S::T>(p);
  else if constexpr (sizeof(typename S::V) == 32)
    product_any_v3<typename S::T>(p);
  else
    product_any_v1<typename S::T>(p);
#else
  product_any<typename S::T>(p);
#endif
}

// op(op(...)) over the lanes, by halves: always in the same order.
template <class S, class V, class F>
FASTREC_INLINE auto reduce(V v, const F& op) {
  if constexpr (sizeof(V) > 16) {
    typedef typename S::T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return reduce<S>(op(low, high), op);
  } else if constexpr (sizeof(typename S::T) == 8) {
    return op(v[0], v[1]);
  } else {
    return op(op(v[0], v[2]), op(v[1], v[3]));
  }
}

// Step DISTANCE of a transposition: the blocks beside the diagonal of a and b change places. The
// lanes are literals, because a shuffle by a vector that the compiler does not know is slow.
template <int DISTANCE, bool HIGH, int LANES>
constexpr int transposed_lane(int i) {
  return (i & ~DISTANCE) + (HIGH ? DISTANCE : 0) + (i & DISTANCE ? LANES : 0);
}
template <int DISTANCE, bool HIGH, class V, int... LANE>
FASTREC_INLINE V exchange(V a, V b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(
      a, b, transposed_lane<DISTANCE, HIGH, static_cast<int>(sizeof...(LANE))>(LANE)...);
}

// rows[i] lane j -> rows[j] lane i.
template <class S, int DISTANCE = S::lanes / 2>
FASTREC_INLINE void transpose(typename S::V (&rows)[S::lanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, S::lanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < S::lanes; ++i) {
    if (i & DISTANCE) continue;
    auto a = rows[i], b = rows[i + DISTANCE];
    rows[i] = exchange<DISTANCE, false>(a, b, lanes);
    rows[i + DISTANCE] = exchange<DISTANCE, true>(a, b, lanes);
  }
  if constexpr (DISTANCE > 1) transpose<S, DISTANCE / 2>(rows);
}

// Lane i: the sum over the lanes of rows[i], by halves as in `reduce`.
template <class S, int DISTANCE = S::lanes / 2>
FASTREC_INLINE typename S::V transposed_sums(typename S::V (&rows)[S::lanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, S::lanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < DISTANCE; ++i) {
    auto a = rows[i], b = rows[i + DISTANCE];
    rows[i] = exchange<DISTANCE, false>(a, b, lanes) + exchange<DISTANCE, true>(a, b, lanes);
  }
  if constexpr (DISTANCE > 1) return transposed_sums<S, DISTANCE / 2>(rows);
  return rows[0];
}

// [rows, width] with row stride ld -> panels [width, NR] of NR source rows each; lanes beyond `rows`
// repeat the last row. Reads and writes whole vectors: rows and panels extend to a multiple of them.
template <class S>
FASTREC_INLINE void pack_transposed(int64_t rows, int64_t width, const typename S::T* source,
                                    int64_t ld, typename S::T* panels, int64_t panel) {
  constexpr int NR = SmallGemm<S>::NR;
  for (int64_t first = 0; first < rows; first += S::lanes) {
    typename S::T* out = panels + first / NR * panel + first % NR;
    for (int64_t k = 0; k < width; k += S::lanes) {
      typename S::V block[S::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < S::lanes; ++i)
        block[i] = S::load(source + std::min(first + i, rows - 1) * ld + k);
      transpose<S>(block);
#pragma GCC unroll 16
      for (int i = 0; i < S::lanes; ++i) S::store(out + (k + i) * NR, block[i]);
    }
  }
}

}  // namespace fastrec
