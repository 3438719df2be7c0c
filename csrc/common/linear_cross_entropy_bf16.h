// SPDX-License-Identifier: Apache-2.0
// The two sweeps of linear_cross_entropy.h for bfloat16 rows on processors that multiply them. P is
// how: `Dot` of bf16_dot.h or `Tiles` of bf16_tiles.h.
//
// Products are of bfloat16 pairs, sums and exponentials are float32. The target's probability never
// goes through bfloat16 beside a 1 that it cancels with: forward keeps it out of the products and
// adds it in float32, backward subtracts the one-hot before it rounds.
#pragma once

#include <algorithm>
#include <vector>

#include "bf16_dot.h"
#include "bf16_tiles.h"
#include "linear_cross_entropy.h"

#ifdef FASTREC_BF16
namespace fastrec {
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace bf16 {

// s += bias and p = pairs of exp(s - max), of a panel [count, NR]; updates the running maxima of
// its lanes.
FASTREC_INLINE void online_softmax(int64_t count, float* s, const float* bias, float* top,
                                   float* column_sum, Pair* p) {
  __m512 shift[NV], sum[NV] = {};
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    __m512 peak = _mm512_loadu_ps(top + j * LANES), second = peak;  // two chains
    // The sum is stored: stores are free beside the arithmetic of the exponentials.
    auto with_bias = [&](int64_t i) __attribute__((always_inline)) {
      float* at = s + i * NR + j * LANES;
      __m512 score = _mm512_loadu_ps(at) + _mm512_set1_ps(bias[i]);
      _mm512_storeu_ps(at, score);
      return score;
    };
    for (int64_t i = 0; i + 1 < count; i += 2) {
      peak = _mm512_max_ps(peak, with_bias(i));
      second = _mm512_max_ps(second, with_bias(i + 1));
    }
    if (count % 2) second = _mm512_max_ps(second, with_bias(count - 1));
    peak = _mm512_max_ps(peak, second);
    _mm512_storeu_ps(top + j * LANES, peak);
    __mmask16 none = _mm512_cmp_ps_mask(peak, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    shift[j] = _mm512_mask_blend_ps(none, peak, _mm512_setzero_ps());
  }
  for (int64_t i = 0; i < count; i += 2) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const float* at = s + i * NR + j * LANES;
      __m512 low = exp2((_mm512_loadu_ps(at) - shift[j]) * LOG2E), high = _mm512_setzero_ps();
      if (i + 1 < count) high = exp2((_mm512_loadu_ps(at + NR) - shift[j]) * LOG2E);
      sum[j] += low + high;
      _mm512_storeu_si512(p + i / 2 * BLOCK + j * LANES, pair(low, high));
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) _mm512_storeu_ps(column_sum + j * LANES, sum[j]);
}

template <class P>
void forward(const ForwardArgs<float>& a) {
  [[maybe_unused]] typename P::Scope scope;
  const Problem<float>& q = a.problem;
  int64_t pairs = P::depth(q.width);
  typename P::Streamed x(BLOCK, q.width), w(TILE, q.width);
  typename P::Sums sums(q.width);
  Buffer<Pair> packed(pairs * BLOCK), p(TILE / 2 * BLOCK);
  Buffer<float> s(TILE * NR);
  float top[BLOCK], before[BLOCK], factor[BLOCK], column_sum[BLOCK], bias[TILE] = {};
  double sum[BLOCK];
  int64_t hot[BLOCK], task;
  while ((task = a.next->fetch_add(1)) < a.blocks * a.ranges) {
    int64_t range = task / a.blocks, first = task % a.blocks * a.block;
    int64_t rows = std::min(a.block, q.rows - first);
    int64_t begin = range * a.range, end = std::min(begin + a.range, q.items);
    x.load(q.x_rows(), first, rows);
    pack_transposed(rows, pairs, x.row(0), x.row_ld(), packed);
    sums.clear();
    std::fill_n(factor, BLOCK, 1.0f);
    std::fill_n(top, BLOCK, -INFINITY);
    std::fill_n(sum, BLOCK, 0.0);
    for (int64_t v = begin; v < end; v += TILE) {
      int64_t count = std::min(TILE, end - v), hots = 0;
      w.load(q.weight, v, count);
      if (q.bias) std::copy_n(q.bias + v, count, bias);
      std::copy_n(top, BLOCK, before);
      for (int64_t n = 0; n < rows; n += NR) {
        P::scores(count, pairs, w.row(0), w.row_ld(), packed + n * pairs, s);
        online_softmax(count, s, bias, top + n, column_sum + n, p + n);
        for (int64_t r = n; r < std::min(rows, n + NR); ++r) {
          int64_t y = q.target[first + r] - v;
          if (y < 0 || y >= count) continue;
          a.target_logit[first + r] = s[y * NR + r - n];
          set(p[y / 2 * BLOCK + r], y % 2, 0);
          hot[hots++] = r;
        }
      }
      bool grown = false;
      for (int64_t r = 0; r < rows; ++r) {
        factor[r] = top[r] > before[r] ? std::exp(before[r] - top[r]) : 1.0f;
        grown |= factor[r] != 1;
        sum[r] = sum[r] * factor[r] + column_sum[r];
      }
      if (!a.with_mean) continue;
      if (grown) sums.scale(factor);
      sums.accumulate(rows, pairs_of(count), p, w.second(0));
      for (int64_t h = 0; h < hots; ++h) {
        int64_t r = hot[h], y = q.target[first + r] - v;
        float e = std::exp(a.target_logit[first + r] - finite_shift(top[r]));
        for (int64_t d = 0; d < q.width; ++d) sums.add(r, d, e * get(w.row(y)[d / 2], d % 2));
      }
    }
    if (a.with_mean) sums.finish();
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = range * q.rows + first + r;
      a.top[at] = top[r];
      a.sum[at] = sum[r];
      if (a.with_mean) std::copy_n(sums.row(r), q.width, a.weighted + at * q.width);
    }
  }
}

// p = pairs of grad_lse exp(s + bias - lse) of a panel [count, NR], and their column sums.
FASTREC_INLINE void probabilities(int64_t count, const float* s, const float* bias,
                                  const float* lse, const float* grad_lse, float* column_sum,
                                  Pair* p) {
  __m512 shift[NV], sum[NV] = {};
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) shift[j] = _mm512_loadu_ps(bias + j * LANES) * LOG2E;
  for (int64_t i = 0; i < count; i += 2) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const float* at = s + i * NR + j * LANES;
      __m512 low = exp2(_mm512_loadu_ps(at) * LOG2E + (shift[j] - lse[i] * LOG2E)) * grad_lse[i];
      __m512 high = _mm512_setzero_ps();
      if (i + 1 < count)
        high = exp2(_mm512_loadu_ps(at + NR) * LOG2E + (shift[j] - lse[i + 1] * LOG2E)) *
               grad_lse[i + 1];
      sum[j] += low + high;
      _mm512_storeu_si512(p + i / 2 * BLOCK + j * LANES, pair(low, high));
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) _mm512_storeu_ps(column_sum + j * LANES, sum[j]);
}

// All scored rows in the orders that `backward` reads. It stands here to be compiled for these
// instructions.
template <class P>
void load_all(const Problem<float>& q, typename P::Streamed& x) {
  x.load(q.x_rows(), 0, q.rows);
}

template <class P>
void backward(const BackwardArgs<float>& a) {
  [[maybe_unused]] typename P::Scope scope;
  const Problem<float>& q = a.problem;
  const auto& x = *static_cast<const typename P::Streamed*>(a.rows_in_pairs);
  const int64_t pairs = P::depth(q.width), ld = row_stride(q.width);
  typename P::Sums sums(q.width);
  Buffer<Pair> w(BLOCK * ld, 0);
  Buffer<Pair> packed(pairs * BLOCK), p(TILE / 2 * BLOCK);
  Buffer<float> s((TILE + P::STEP) * NR);
  float bias[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  std::vector<OneHot> hots;
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.blocks) {
    int64_t first = task * a.block, items = std::min(a.block, q.items - first);
    const OneHot* end = a.one_hot + q.rows;
    hots.assign(std::lower_bound(a.one_hot, end, OneHot{first, 0}),
                std::lower_bound(a.one_hot, end, OneHot{first + items, 0}));
    std::sort(hots.begin(), hots.end(),
              [](const OneHot& l, const OneHot& r) { return l.row < r.row; });
    auto hot = hots.begin(), next = hot;
    for (int64_t i = 0; i < items; ++i) load_row(q.weight, first + i, q.width, w + i * ld);
    pack_transposed(items, pairs, w, ld, packed);
    sums.clear();
    std::fill_n(bias, BLOCK, 0.0f);
    std::fill_n(sum, BLOCK, 0.0);
    if (q.bias) std::copy_n(q.bias + first, items, bias);
    for (int64_t row = 0; row < q.rows; row += TILE) {
      int64_t count = std::min(TILE, q.rows - row);
      hot = next;
      while (next != hots.end() && next->row < row + count) ++next;
      for (int64_t n = 0; n < items; n += NR) {
        P::scores(count, pairs, x.row(row), x.row_ld(), packed + n * pairs, s);
        probabilities(count, s, bias + n, a.shift + row, a.grad_lse + row, column_sum + n, p + n);
        for (auto at = hot; at != next; ++at) {
          int64_t i = at->item - first, r = at->row - row;
          if (i < n || i >= n + NR) continue;
          float exact = std::exp(s[r * NR + i - n] + bias[i] - a.shift[at->row]);
          float grad = a.grad_target_logit[at->row];
          set(p[r / 2 * BLOCK + i], r % 2, exact * a.grad_lse[at->row] + grad);
          sum[i] += grad;
        }
      }
      for (int64_t i = 0; i < items; ++i) sum[i] += column_sum[i];
      sums.accumulate(items, pairs_of(count), p, x.second(row));
    }
    sums.finish();
    for (int64_t i = 0; i < items; ++i) {
      store_row<float>(sums.row(i), a.grad_weight, a.weight_dtype, (first + i) * q.width,
                       q.width);
      if (a.grad_bias) store_row<double>(sum + i, a.grad_bias, a.bias_dtype, first + i, 1);
    }
  }
}

}  // namespace bf16
#pragma GCC pop_options
}  // namespace fastrec
#endif
