// SPDX-License-Identifier: Apache-2.0
// The step of a row-wise optimizer on one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace fastrec {

template <class T>
struct RowConstants {
  T eps, first, second;  // Adam's averages keep `first` and `second` of themselves
};

// Without square: SGD. Without mean: Adagrad with a number a row. With both: Adam, whose averages are
// like the row. No loop over d reads what another one writes: value, square and mean are rows of
// different tensors.
template <class T>
FASTREC_INLINE void update_row(const RowConstants<T>& u, int64_t n, const T* __restrict grad,
                               T* __restrict value, T* __restrict square, T* __restrict mean,
                               T rate) {
  if (!square) {
    for (int64_t d = 0; d < n; ++d) value[d] -= rate * grad[d];
  } else if (!mean) {
    T total = 0;
    for (int64_t d = 0; d < n; ++d) total += grad[d] * grad[d];
    *square += total / n;
    const T scale = rate / (std::sqrt(*square) + u.eps);
    for (int64_t d = 0; d < n; ++d) value[d] -= scale * grad[d];
  } else {
    for (int64_t d = 0; d < n; ++d) {
      mean[d] += (grad[d] - mean[d]) * (1 - u.first);
      square[d] += (grad[d] * grad[d] - square[d]) * (1 - u.second);
      value[d] -= rate * (mean[d] / (std::sqrt(square[d]) + u.eps));
    }
  }
}

}  // namespace fastrec
