// SPDX-License-Identifier: Apache-2.0
// The normal distribution on vectors, which GELU and its derivative are made of.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace fastrec {

// P(z) = 1/2 erfc(-z / sqrt 2) and p(z) = exp(-z^2 / 2) / sqrt(2 pi) of N vectors.
//
// P(-|z|) = exp(-z^2 / 2) t R(t) with t = 1 / (1 + 0.34 |z|) and R a polynomial of degree 8, fitted
// to the relative error (3e-8): the tail keeps its digits, and the exponential is that of p.
template <class S, int N>
FASTREC_INLINE void normal(const typename S::V (&z)[N], typename S::V (&cdf)[N],
                           typename S::V (&density)[N]) {
  using V = typename S::V;
  using T = typename S::T;
  constexpr T inverse_sqrt_2pi = T(0.398942280401432677939946);
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < S::lanes; ++j) {
        cdf[i][j] = std::erfc(-z[i][j] * T(0.707106781186547524400845)) / 2;
        density[i][j] = inverse_sqrt_2pi * std::exp(-z[i][j] * z[i][j] / 2);
      }
    }
  } else {
    constexpr T fit[] = {0.1356205033f,  0.1361122002f, 0.1151976283f,
                         0.1153593053f,  -0.04471884362f, 0.2021833236f,
                         -0.2731333862f, 0.1394998372f, -0.02612055302f};
    V e[N], t[N], r[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) e[i] = z[i] * z[i] * T(-0.5);
    S::exp(e);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      t[i] = T(1) / ((z[i] < 0 ? -z[i] : z[i]) * T(0.34) + T(1));
      r[i] = V{} + fit[8];
    }
#pragma GCC unroll 8
    for (int d = 7; d >= 0; --d) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) r[i] = r[i] * t[i] + fit[d];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      V tail = e[i] * t[i] * r[i];
      cdf[i] = z[i] < 0 ? tail : T(1) - tail;
      density[i] = e[i] * inverse_sqrt_2pi;
    }
  }
}

// step(d, v) for the whole vectors of a row, four at a time, then one at a time.
template <class S, class Four, class One>
FASTREC_INLINE void for_vectors(int64_t padded_width, const Four& four, const One& one) {
  int64_t d = 0;
  for (; d + 4 * S::lanes <= padded_width; d += 4 * S::lanes) four(d);
  for (; d < padded_width; d += S::lanes) one(d);
}

}  // namespace fastrec
