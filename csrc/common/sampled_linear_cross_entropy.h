// SPDX-License-Identifier: Apache-2.0
// The arithmetic of sampled_linear_cross_entropy that own and shared negatives have in common, free
// of torch types except the dtype of a row.
//
// Legend: N rows, K negatives, D width, ld = padded<T>(D).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "layer_norm.h"
#include "linear_cross_entropy.h"
#include "small_gemm.h"

namespace fastrec {

constexpr int64_t LINE = 64;   // negatives of a row that are scored before they are used
constexpr int64_t AHEAD = 32;  // negatives, or pairs of a sum, whose rows are prefetched

// A negative that is the target of a row.
struct Hit {
  int64_t item, place;
  bool operator<(const Hit& other) const {
    return item != other.item ? item < other.item : place < other.place;
  }
};

template <class T>
struct SampledArgs {
  int64_t rows, negatives, width, ld;
  T beta;                  // negative: softmax
  const T* x;              // [N + a register tile of zeros, ld]
  const int64_t* target;   // [N], -1: not scored
  const int64_t* drawn;    // [N, K] or [K]
  Rows weight;             // [V, D]
  const T *bias, *log_q;   // [V] or null
  // Shared negatives only: their rows [K + a register tile, ld], offsets [K] and sorted ids.
  const T *shared, *shared_offset;
  const Hit* sorted;       // [K]
  int64_t begin, end;      // rows, or blocks of rows (forward) or negatives (backward)
  T *loss, *grad_input, *grad_target, *grad_negatives;  // grad_input may be null
  T *lse, *left_out;       // [N]: rounded, and what rounding left out
  // Backward of shared negatives: times what the rounding of lse left out; lse = inf where a row is
  // not scored.
  const T* grad_loss;
  T *grad_shared, *grad_offset;

  T offset(int64_t item) const {
    return (bias ? bias[item] : T(0)) - (log_q ? log_q[item] : T(0));
  }
};

template <class S, class T = typename S::T>
FASTREC_INLINE void add_scaled(int64_t width, T scale, const T* row, T* out) {
  for (int64_t d = 0; d < width; d += S::lanes)
    S::store(out + d, S::load(out + d) + scale * S::load(row + d));
}

// s[j] = x . row_j. Whole vectors: width is a multiple of the lanes, and so is the room in s.
template <class S, class T = typename S::T>
FASTREC_INLINE void row_scores(int64_t count, int64_t width, const T* x, const T* const* row,
                               T* s) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  for (int64_t j = 0; j < count; j += L) {
    V part[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const T* w = row[std::min(j + l, count - 1)];
      V sum = {};
      for (int64_t d = 0; d < width; d += L) sum += S::load(x + d) * S::load(w + d);
      part[l] = sum;
    }
    transpose<S>(part);
#pragma GCC unroll 4
    for (int step = L / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int l = 0; l < step; ++l) part[l] += part[l + step];
    }
    S::store(s + j, part[0]);
  }
}

// exp(v) for v <= 0, of every element.
template <class S>
FASTREC_INLINE typename S::V exp_of(typename S::V v) {
  typename S::V one[1] = {v};
  S::exp(one);
  return one[0];
}

// s -> scale * sigmoid(s), vector by vector; -inf gives 0. Returns exp(-|s|).
template <class S, class V = typename S::V>
FASTREC_INLINE V sigmoid(V& s, typename S::T scale) {
  V e = exp_of<S>(s < V{} ? s : -s);
  V one = V{} + typename S::T(1);
  s = scale * ((s < V{} ? e : one) / (one + e));
  return e;
}

// What a row knows of its negatives: softmax: the maximum and the sum of exp(s - maximum); binary:
// sum is the sum of softplus(s).
struct Seen {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
};

// Loss, c_iy, and the factor of the terms exp(s - top) that make them the c_ij.
template <class T>
FASTREC_INLINE void finish_softmax(const Seen& seen, double target, T& loss, T& grad_target, T& lse,
                                   T& left_out, T& scale) {
  double top = seen.top, sum = seen.sum;
  const double zero = target - target;  // inf - inf: NaN, as in a softmax over all candidates
  if (sum == 0) {
    loss = grad_target = scale = static_cast<T>(zero), left_out = T(0);
    lse = static_cast<T>(target + zero);
  } else if (target >= top) {
    double e = std::exp(top - target) + zero, others = sum * e;
    loss = static_cast<T>(std::log1p(others));
    split_lse(static_cast<T>(target), std::log1p(others), lse, left_out);
    grad_target = static_cast<T>(-others / (1 + others)), scale = static_cast<T>(e / (1 + others));
  } else {
    double total = sum + std::exp(target - top);
    loss = static_cast<T>(std::log(total) + (top - target));
    split_lse(static_cast<T>(top), std::log(total), lse, left_out);
    grad_target = static_cast<T>(-sum / total), scale = static_cast<T>(1 / total);
  }
}
template <class T>
FASTREC_INLINE void finish_binary(const SampledArgs<T>& a, double sum, double target, T& loss,
                                  T& grad_target) {
  double e = std::exp(-std::abs(target)), count = static_cast<double>(a.negatives + 1);
  double softplus = (target < 0 ? -target : 0) + std::log1p(e);
  loss = static_cast<T>((a.beta * softplus + sum) / count);
  grad_target = static_cast<T>(-a.beta * (target < 0 ? 1 : e) / (1 + e) / count);
}

}  // namespace fastrec
