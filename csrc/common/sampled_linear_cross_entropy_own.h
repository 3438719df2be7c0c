// SPDX-License-Identifier: Apache-2.0
// sampled_linear_cross_entropy, every row with its own negatives: a row streams its K rows of the
// table once, LINE at a time; those of a line are in the L1 when they are added to the gradient of
// the row.
#pragma once

#include "sampled_linear_cross_entropy.h"

namespace fastrec {

// out += sum_j p[j] row_j
template <int N, class S, class T = typename S::T>
FASTREC_INLINE void add_rows_tile(int64_t count, const T* p, const T* const* row, int64_t d,
                                  T* out) {
  typename S::V sum[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sum[n] = S::load(out + d + n * S::lanes);
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] += p[j] * S::load(row[j] + d + n * S::lanes);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) S::store(out + d + n * S::lanes, sum[n]);
}
template <class S, class T = typename S::T>
FASTREC_INLINE void add_rows(int64_t count, int64_t width, const T* p, const T* const* row,
                             T* out) {
  int64_t d = 0;
  for (; d + 4 * S::lanes <= width; d += 4 * S::lanes) add_rows_tile<4, S>(count, p, row, d, out);
  for (; d < width; d += S::lanes) add_rows_tile<1, S>(count, p, row, d, out);
}

// A product of factors 1 + e in (1, 2], whose logarithm is the sum of log1p(e): one logarithm for
// LINE of them. In double the sum 1 + e loses nothing that a float shows.
template <class S, class T = typename S::T>
FASTREC_INLINE double line_of_losses(int64_t count, T* s, T scale) {
  using V = typename S::V;
  double product = 1, above = 0;
  for (int64_t j = 0; j < count; j += S::lanes) {
    V v = S::load(s + j), positive = v > V{} ? v : V{};
    V e = sigmoid<S>(v, scale);
    S::store(s + j, v);
    for (int l = 0; l < S::lanes && j + l < count; ++l) {
      product *= 1.0 + e[l];
      above += positive[l];
    }
  }
  return above + std::log(product);
}

// Rows [begin, end), each with its own negatives.
template <class S, class T = typename S::T>
FASTREC_INLINE void own_forward_rows(const SampledArgs<T>& a) {
  using V = typename S::V;
  const int64_t width = round_up(a.width, S::lanes), K = a.negatives;
  const bool direct = a.weight.dtype == compute_dtype<T>() && a.width == width;
  const bool softmax = a.beta < 0;
  const int64_t bytes = a.weight.stride < 0 ? 0 : std::min<int64_t>(a.weight.stride, 4096);
  const T share = T(1) / static_cast<T>(K + 1);
  Buffer<T> rows((LINE + 1) * a.ld), gradient(a.ld);
  T *tile = rows, *sum = gradient;
  std::fill_n(tile, (LINE + 1) * a.ld, T(0));
  const T* row[LINE];
  alignas(64) T s[LINE], p[LINE];
  auto fetch = [&](int64_t item, int64_t slot) __attribute__((always_inline)) {
    if (direct) return reinterpret_cast<const T*>(a.weight.data + item * a.weight.stride);
    a.weight.load(item, tile + slot * a.ld, a.width);
    return static_cast<const T*>(tile + slot * a.ld);
  };
  for (int64_t i = a.begin; i < a.end; ++i) {
    const int64_t y = a.target[i], *drawn = a.drawn + i * K;
    T* kept = a.grad_negatives ? a.grad_negatives + i * K : nullptr;
    if (y < 0) {
      a.loss[i] = a.grad_target[i] = a.lse[i] = a.left_out[i] = T(0);
      if (kept) std::fill_n(kept, K, T(0));
      if (a.grad_input) std::fill_n(a.grad_input + i * a.width, a.width, T(0));
      continue;
    }
    const T* x = a.x + i * a.ld;
    const T* target_row = fetch(y, LINE);
    row_scores<S>(1, width, x, &target_row, s);
    const double target = s[0] + a.offset(y);
    std::fill_n(sum, width, T(0));
    Seen seen;
    for (int64_t first = 0; first < K; first += LINE) {
      const int64_t count = std::min(LINE, K - first);
      // The ids of the next row follow those of this one.
      const int64_t last = (a.end - i) * K;
      for (int64_t j = 0; j < count; ++j) {
        if (first + j + AHEAD < last) {
          const char* next = a.weight.data + drawn[first + j + AHEAD] * a.weight.stride;
          for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
        }
        row[j] = fetch(drawn[first + j], j);
        if (j % S::lanes == S::lanes - 1 || j == count - 1) {
          const int64_t from = j / S::lanes * S::lanes;
          row_scores<S>(j + 1 - from, width, x, row + from, s + from);
        }
      }
      for (int64_t j = 0; j < round_up(count, S::lanes); ++j) {
        const bool out = j >= count || drawn[first + j] == y;
        s[j] = out ? -std::numeric_limits<T>::infinity() : s[j] + a.offset(drawn[first + j]);
      }
      if (softmax) {
        if (kept) std::copy_n(s, count, kept + first);
        T top = static_cast<T>(seen.top);
        for (int64_t j = 0; j < count; ++j) top = std::max(top, s[j]);
        if (top > seen.top) {
          const T fade = static_cast<T>(std::exp(seen.top - top));
          seen.top = top, seen.sum *= fade;
          for (int64_t d = 0; d < width; ++d) sum[d] *= fade;
        }
        const V shift = V{} + finite_shift(top);
        V total = {};
        for (int64_t j = 0; j < count; j += S::lanes) {
          V e = exp_of<S>(S::load(s + j) - shift);
          S::store(p + j, e);
          total += e;
        }
        for (int l = 0; l < S::lanes; ++l) seen.sum += total[l];
      } else {
        seen.sum += line_of_losses<S>(count, s, share);
        std::copy_n(s, count, p);
        if (kept) std::copy_n(s, count, kept + first);
      }
      if (a.grad_input) add_rows<S>(count, width, p, row, sum);
    }
    T scale = T(1);
    if (softmax)
      finish_softmax(seen, target, a.loss[i], a.grad_target[i], a.lse[i], a.left_out[i], scale);
    else
      finish_binary(a, seen.sum, target, a.loss[i], a.grad_target[i]), a.lse[i] = a.left_out[i] = T(0);
    if (a.grad_input) {
      for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
      add_scaled<S>(width, a.grad_target[i], target_row, sum);
      std::copy_n(sum, a.width, a.grad_input + i * a.width);
    }
    if (!softmax || !kept) continue;
    const V shift = V{} + finite_shift(static_cast<T>(seen.top));
    for (int64_t j = 0; j < K; j += S::lanes) {
      const int64_t n = std::min<int64_t>(S::lanes, K - j);
      if (n == S::lanes) {
        S::store(kept + j, scale * exp_of<S>(S::load(kept + j) - shift));
        continue;
      }
      std::copy_n(kept + j, n, s);
      S::store(s, scale * exp_of<S>(S::load(s) - shift));
      std::copy_n(s, n, kept + j);
    }
  }
}

FASTREC_DEFINE_PER_ISA(own_forward, SampledArgs, own_forward_rows)

}  // namespace fastrec
