// SPDX-License-Identifier: Apache-2.0
// The two sweeps of multilabel_bce, free of torch types except the dtype of a row.
//
// Forward: a task owns blocks of rows and streams labels; where the gradient of the labels is that
// of a sum of the losses, it is added up on the way. Backward: a task owns a block of labels and
// streams a range of rows. Lanes of a vector are always the stationary side. The sign of the score
// of a row and one of its labels is turned before the sigmoid and after it: nothing cancels.
//
// Legend: N scored rows, A labels, D width, ld = padded<T>(D).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "convert.h"
#include "gemm.h"
#include "simd.h"

namespace fastrec {

// log(1 + e) = e poly(e) for 0 <= e <= 1, interpolated at Chebyshev nodes: relative error 8e-10 and
// 3e-19. Small e keep their digits, which a logarithm of 1 + e loses.
template <class T>
struct Log1pConstants;
template <>
struct Log1pConstants<float> {
  static constexpr float poly[] = {
      0.99999999916f,  -0.49999979491f, 0.33332497544f,   -0.24986496459f,
      0.19885820285f,  -0.16087623009f, 0.12377995868f,   -0.081880409236f,
      0.041006573694f, -0.013187826566f, 0.0019866965937f};
};
template <>
struct Log1pConstants<double> {
  static constexpr double poly[] = {
      0.9999999999999999997,  -0.4999999999999997012, 0.3333333333332805014,
      -0.2499999999962715546, 0.1999999998598431312,  -0.1666666634188850196,
      0.142857092206460805,   -0.1249994365534367296, 0.1111064536944143502,
      -0.09997052287665967025, 0.09076296534777898143, -0.08275586484159500734,
      0.07507792401956032467, -0.0666047052801388773, 0.056236352954791616,
      -0.04364087814121117842, 0.02993721073850981191, -0.01743032829151715232,
      0.008247545287913184885, -0.003012725190994972786, 0.0007911120943342025316,
      -0.0001322075217130075608, 0.00001052313548127169989};
};

template <class T>
struct MultilabelArgs {
  int64_t rows, labels, width, ld;
  const T* x;     // [N + a register tile of zeros, ld]
  Rows weight;    // [A, D]
  const T* bias;  // [A] or null
  // Labels of row i: listed[list_begin[i] ... list_end[i]], rising.
  const int64_t* listed;
  const int64_t* list_begin;
  const int64_t* list_end;
  int64_t block, blocks;  // rows (backward: labels) per task
  // Forward.
  double* loss;  // [N]
  T* grad_x;     // [N, D] or null
  int64_t per_task, tasks;  // blocks of a task, and tasks
  // Gradients of the sum of the losses over the rows of a task, zeros before, or null:
  T* sum_weight;     // [tasks, sum_size]: [A, ld] and the rest of a register tile
  double* sum_bias;  // [tasks, A]
  int64_t sum_size;
  // Backward.
  int64_t range, ranges;  // rows per task
  const T* grad_loss;     // [N]
  T* grad_weight;         // [ranges, A, D]
  double* grad_bias;      // [ranges, A]
  std::atomic<int64_t>* next;
};

// ROWS rows of a panel: s -> scale(i, sigmoid(s)). What is added to `sum`: softplus(s) if LOSS, else
// the new s.
template <int ROWS, bool LOSS, class S, class Scale>
FASTREC_INLINE void sigmoid_rows(int64_t first, typename S::T* s,
                                 typename S::V (&sum)[Gemm<S>::NV], const Scale& scale) {
  using T = typename S::T;
  using V = typename S::V;
  constexpr int NV = Gemm<S>::NV, N = ROWS * NV;
  constexpr auto& poly = Log1pConstants<T>::poly;
  constexpr int degree = sizeof(poly) / sizeof(T) - 1;
  V value[N], e[N], y[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    value[i] = S::load(s + i / NV * BLOCK + i % NV * S::lanes);
    e[i] = -S::max(value[i], -value[i]);
  }
  S::exp(e);
  if constexpr (LOSS) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) y[i] = e[i] * poly[degree] + poly[degree - 1];
#pragma GCC unroll 24
    for (int d = degree - 2; d >= 0; --d) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) y[i] = y[i] * e[i] + poly[d];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i % NV] += S::max(value[i], V{}) + y[i] * e[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    V top = value[i] > T(0) ? V{} + T(1) : e[i];
    V p = scale(first + i / NV, top / (e[i] + T(1)));
    S::store(s + i / NV * BLOCK + i % NV * S::lanes, p);
    if constexpr (!LOSS) sum[i % NV] += p;
  }
}

// The same for a whole panel [count, NR], and the column sums of what is added.
template <bool LOSS, class S, class Scale>
FASTREC_INLINE void sigmoids(int64_t count, typename S::T* s, typename S::T* column_sum,
                             const Scale& scale) {
  constexpr int NV = Gemm<S>::NV;
  constexpr int64_t LINK = 16;  // the rounding error grows with the length of a chain
  typename S::V total[NV] = {};
  for (int64_t i = 0; i < count;) {
    typename S::V sum[NV] = {};
    const int64_t stop = std::min(i + LINK, count);
    for (; i + 2 <= stop; i += 2) sigmoid_rows<2, LOSS, S>(i, s + i * BLOCK, sum, scale);
    if (i < stop) sigmoid_rows<1, LOSS, S>(i, s + i * BLOCK, sum, scale), ++i;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) total[j] += sum[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) S::store(column_sum + j * S::lanes, total[j]);
}

// Adds bias(i, j), of row i and vector j, to a panel [count, NR].
template <class S, class Bias>
FASTREC_INLINE void add_bias(int64_t count, typename S::T* s, const Bias& bias) {
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Gemm<S>::NV; ++j) {
      typename S::T* at = s + i * BLOCK + j * S::lanes;
      S::store(at, S::load(at) + bias(i, j));
    }
  }
}

// The place in a tile of scores [TILE, BLOCK] of a row and one of its labels.
struct LabelHit {
  int32_t streamed, lane;
};

// Turns the signs of those in a panel that begins at lane n; `sums`, if not null, are told.
template <class T>
FASTREC_INLINE void turn(const std::vector<LabelHit>& hits, int64_t n, int64_t lanes, T* s,
                         double* sums = nullptr) {
  for (const LabelHit& hit : hits) {
    if (hit.lane < n || hit.lane >= n + lanes) continue;
    T& value = s[hit.streamed * BLOCK + hit.lane];
    value = -value;
    if (sums) sums[hit.lane] += 2 * static_cast<double>(value);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void multilabel_forward_tasks(const MultilabelArgs<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  Buffer<T> packed(a.width * BLOCK), tile(TILE * a.ld), s(TILE * BLOCK, T(0)), acc(BLOCK * a.ld);
  std::fill_n(static_cast<T*>(tile), TILE * a.ld, T(0));
  std::vector<LabelHit> hits;
  T column_sum[BLOCK], bias[TILE];
  double sum[BLOCK];
  int64_t at[BLOCK], task;

  const auto one_block = [&](int64_t block) __attribute__((always_inline)) {
    const int64_t first = block * a.block, rows = std::min(a.block, a.rows - first);
    const T* x = a.x + first * a.ld;
    G::pack_transposed(rows, a.width, x, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    std::copy_n(a.list_begin + first, rows, at);
    for (int64_t v = 0; v < a.labels; v += TILE) {
      const int64_t count = std::min(TILE, a.labels - v);
      for (int64_t i = 0; i < count; ++i) {
        a.weight.load(v + i, tile + i * a.ld, a.width);
        bias[i] = a.bias ? a.bias[v + i] : T(0);
      }
      hits.clear();
      for (int64_t r = 0; r < rows; ++r) {
        for (const int64_t end = a.list_end[first + r]; at[r] < end; ++at[r]) {
          const int64_t label = a.listed[at[r]] - v;
          if (label >= count) break;
          hits.push_back({static_cast<int32_t>(label), static_cast<int32_t>(r)});
        }
      }
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
        if (a.bias)
          add_bias<S>(count, s + n, [&](int64_t i, int)
                          __attribute__((always_inline)) { return bias[i]; });
        turn(hits, n, G::NR, static_cast<T*>(s));
        sigmoids<true, S>(count, s + n, column_sum + n,
                          [](int64_t, V p) __attribute__((always_inline)) { return p; });
        if (a.grad_x || a.sum_weight) turn(hits, n, G::NR, static_cast<T*>(s));
      }
      for (int64_t r = 0; r < rows; ++r) sum[r] += column_sum[r];
      if (a.grad_x) G::accumulate(rows, count, a.width, s, tile, a.ld, acc, a.ld);
      if (a.sum_weight) {
        T* to = a.sum_weight + task * a.sum_size + v * a.ld;
        G::template accumulate<BLOCK, 1>(count, rows, a.width, s, x, a.ld, to, a.ld);
      }
      for (int64_t i = 0; a.sum_bias && i < count; ++i) {
        const T* p = s + i * BLOCK;
        a.sum_bias[task * a.labels + v + i] += std::accumulate(p, p + rows, 0.0);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      a.loss[first + r] = sum[r];
      if (a.grad_x) std::copy_n(acc + r * a.ld, a.width, a.grad_x + (first + r) * a.width);
    }
  };

  while ((task = a.next->fetch_add(1)) < a.tasks) {
    const int64_t stop = std::min((task + 1) * a.per_task, a.blocks);
    for (int64_t block = task * a.per_task; block < stop; ++block) one_block(block);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void multilabel_backward_tasks(const MultilabelArgs<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  Buffer<T> packed(a.width * BLOCK), s(TILE * BLOCK, T(0)), acc(BLOCK * a.ld);
  std::vector<LabelHit> hits;
  T bias[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.blocks * a.ranges) {
    // Neighbouring tasks are label blocks of one range of rows.
    const int64_t range = task / a.blocks, first = task % a.blocks * a.block;
    const int64_t labels = std::min(a.block, a.labels - first);
    for (int64_t i = 0; i < labels; ++i) a.weight.load(first + i, acc + i * a.ld, a.width);
    G::pack_transposed(labels, a.width, acc, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(bias, BLOCK, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    if (a.bias) std::copy_n(a.bias + first, labels, bias);
    const int64_t end = std::min((range + 1) * a.range, a.rows);
    for (int64_t row = range * a.range; row < end; row += TILE) {
      const int64_t count = std::min(TILE, end - row);
      const T* tile = a.x + row * a.ld;
      hits.clear();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t* stop = a.listed + a.list_end[row + i];
        const int64_t* k = std::lower_bound(a.listed + a.list_begin[row + i], stop, first);
        for (; k < stop && *k < first + labels; ++k)
          hits.push_back({static_cast<int32_t>(i), static_cast<int32_t>(*k - first)});
      }
      for (int64_t n = 0; n < labels; n += G::NR) {
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
        if (a.bias)
          add_bias<S>(count, s + n, [&](int64_t, int j) __attribute__((always_inline)) {
            return S::load(bias + n + j * S::lanes);
          });
        turn(hits, n, G::NR, static_cast<T*>(s));
        sigmoids<false, S>(count, s + n, column_sum + n,
                           [&](int64_t i, V p) __attribute__((always_inline)) {
                             return p * a.grad_loss[row + i];
                           });
        turn(hits, n, G::NR, static_cast<T*>(s), sum);
      }
      for (int64_t i = 0; i < labels; ++i) sum[i] += column_sum[i];
      G::accumulate(labels, count, a.width, s, tile, a.ld, acc, a.ld);
    }
    for (int64_t i = 0; i < labels; ++i) {
      const int64_t to = range * a.labels + first + i;
      std::copy_n(acc + i * a.ld, a.width, a.grad_weight + to * a.width);
      a.grad_bias[to] = sum[i];
    }
  }
}

FASTREC_DEFINE_PER_ISA(multilabel_forward, MultilabelArgs, multilabel_forward_tasks)
FASTREC_DEFINE_PER_ISA(multilabel_backward, MultilabelArgs, multilabel_backward_tasks)

}  // namespace fastrec
