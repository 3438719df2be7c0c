// SPDX-License-Identifier: Apache-2.0
// The logistic function and tanh on vectors: the gates of a recurrent cell.
#pragma once

#include <cmath>

#include "simd.h"

namespace fastrec {

// x -> 1 / (1 + exp(-x)) of N vectors. The exponential is that of -|x|, so nothing overflows and the
// lower tail keeps its digits.
template <class S, int N>
FASTREC_INLINE void sigmoid(typename S::V (&x)[N]) {
  using V = typename S::V;
  using T = typename S::T;
  V e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) e[i] = x[i] < 0 ? x[i] : -x[i];
  S::exp(e);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    V t = T(1) / (e[i] + T(1));
    x[i] = x[i] < 0 ? e[i] * t : t;
  }
}

// x -> tanh(x) of N vectors: (1 - e) / (1 + e) with e = exp(-2 |x|), and below 1/2, where 1 - e
// cancels, x + x^3 Q(x^2) with Q of degree 4, fitted to the relative error (4e-10).
template <class S, int N>
FASTREC_INLINE void tanh(typename S::V (&x)[N]) {
  using V = typename S::V;
  using T = typename S::T;
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < N; ++i) {
      T lane[S::lanes];
      S::store(lane, x[i]);
      for (T& value : lane) value = std::tanh(value);
      x[i] = S::load(lane);
    }
  } else {
    constexpr T fit[] = {-0.333333283662796f, 0.13332964479923248f, -0.053899168968200684f,
                         0.021297868341207504f, -0.00664726085960865f};
    V e[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) e[i] = (x[i] < 0 ? x[i] : -x[i]) * T(2);
    S::exp(e);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      V square = x[i] * x[i], q = square * fit[4] + fit[3];
      for (int d = 2; d >= 0; --d) q = q * square + fit[d];
      V small = x[i] * square * q + x[i], large = (T(1) - e[i]) / (T(1) + e[i]);
      large = x[i] < 0 ? -large : large;
      x[i] = square < T(0.25) ? small : large;
    }
  }
}

}  // namespace fastrec
