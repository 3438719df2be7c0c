// SPDX-License-Identifier: Apache-2.0
// The log of a sum of exponentials, of which every softmax here takes differences.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "simd.h"

namespace fastrec {

template <class T>
FASTREC_INLINE T finite_shift(T top) {
  // Everything at -inf: exp(-inf - 0) = 0 where exp(-inf - -inf) would be NaN.
  return top == -std::numeric_limits<T>::infinity() ? T(0) : top;
}

// lse = top + log_sum, rounded, and what rounding left out. At scores of some hundreds that is far
// more than an eps of exp(s - lse).
template <class T>
inline void split_lse(T top, double log_sum, T& lse, T& left_out) {
  lse = static_cast<T>(top + log_sum);
  double large = top, small = log_sum;
  if (std::fabs(large) < std::fabs(small)) std::swap(large, small);
  left_out = std::isfinite(lse) ? static_cast<T>((large - lse) + small) : T(0);
}

}  // namespace fastrec
