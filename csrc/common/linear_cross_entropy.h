// SPDX-License-Identifier: Apache-2.0
// The two sweeps of linear_cross_entropy, free of torch types except the dtype of a row.
//
// Forward: a task owns a block of rows and streams items. Backward: a task owns a block of items
// and streams rows. Both compute the same products in the same order, so a score has the same bits
// in both and exp(s - lse) <= 1. Lanes of a vector are always the stationary side.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "bf16_products.h"
#include "convert.h"
#include "gemm.h"
#include "lse.h"
#include "row_update.h"
#include "simd.h"

namespace fastrec {

// N scored rows, V items, D width, ld = padded<T>(D).
template <class T>
struct Problem {
  int64_t rows, items, width, ld;
  const T* x;             // [N + a register tile of zeros, ld]
  const int64_t* target;  // [N]
  Rows weight;            // [V, D]
  const T* bias;          // [V] or null
  Bf16 bf16;              // how rows of bfloat16 are multiplied, with a table rounded to it

  Rows x_rows() const {
    return {reinterpret_cast<const char*>(x), ld * int64_t(sizeof(T)), compute_dtype<T>()};
  }
};

template <class T>
struct ForwardArgs {
  Problem<T> problem;
  bool with_mean;
  int64_t block, blocks, range, ranges;  // rows per task, items per task
  // Per range of items and row: running maximum, sum of exp(s - max), sum of exp(s - max) W.
  T* top;           // [ranges, N]
  double* sum;      // [ranges, N]
  T* weighted;      // [ranges, N, D]
  T* target_logit;  // [N]
  std::atomic<int64_t>* next;
};

struct OneHot {
  int64_t item, row;
  bool operator<(const OneHot& other) const {
    return item != other.item ? item < other.item : row < other.row;
  }
};

// A row-wise optimizer (fastrec/training/rows.py), which the sweep of the table applies to a row as
// soon as its gradient is whole, so that the gradient of the table is nowhere.
template <class T>
struct RowUpdate {
  T *table, *bias;  // [V, D], [V] or null: what the scores are of
  // More gradient of some rows, ascending and different: [U], [U, D].
  const int64_t* rows;
  const T* grad;
  int64_t count;
  // See update_row: [V] for Adagrad, [V, D] for Adam.
  T *square, *mean, *bias_square, *bias_mean;
  T rate, bias_rate;
  RowConstants<T> how;
};

template <class T>
struct BackwardArgs {
  Problem<T> problem;
  int64_t block, blocks;       // items per task
  const T* shift;              // [N]: lse, rounded; grad_lse has what that left out
  const T* grad_lse;           // [N]
  const T* grad_target_logit;  // [N]
  const OneHot* one_hot;    // [N], sorted by item, then by row
  void* grad_weight;           // [V, D]
  void* grad_bias;             // [V] or null
  ScalarType weight_dtype, bias_dtype;
  const void* rows_in_pairs;   // x, the `Streamed` of linear_cross_entropy_bf16.h, or null
  const RowUpdate<T>* update;       // in the place of grad_weight and grad_bias, or null
  std::atomic<int64_t>* next;
};

// s -> scale(i, exp(argument(i, j, s))) for `ROWS` rows i and the vectors j of a panel.
template <int ROWS, int64_t STRIDE, class S, class Argument, class Scale>
FASTREC_INLINE void exponential_rows(int64_t first, typename S::T* s,
                                     typename S::V (&sum)[Gemm<S>::NV], const Argument& argument,
                                     const Scale& scale) {
  constexpr int NV = Gemm<S>::NV;
  typename S::V p[ROWS * NV];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS * NV; ++i)
    p[i] = argument(first + i / NV, i % NV, S::load(s + i / NV * STRIDE + i % NV * S::lanes));
  S::exp(p);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS * NV; ++i) {
    p[i] = scale(first + i / NV, p[i]);
    S::store(s + i / NV * STRIDE + i % NV * S::lanes, p[i]);
    sum[i % NV] += p[i];
  }
}

// The same for a whole panel [count, NR]; also its column sums.
template <class S, int64_t STRIDE = BLOCK, class Argument, class Scale>
FASTREC_INLINE void exponentials(int64_t count, typename S::T* s, typename S::T* column_sum,
                                 const Argument& argument, const Scale& scale) {
  typename S::V sum[Gemm<S>::NV] = {};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2)
    exponential_rows<2, STRIDE, S>(i, s + i * STRIDE, sum, argument, scale);
  if (i < count) exponential_rows<1, STRIDE, S>(i, s + i * STRIDE, sum, argument, scale);
#pragma GCC unroll 4
  for (int j = 0; j < Gemm<S>::NV; ++j) S::store(column_sum + j * S::lanes, sum[j]);
}

// s -> exp(s + bias - max) for a panel [count, NR]; updates the running maxima of its lanes.
template <class S, int64_t STRIDE = BLOCK, class T = typename S::T>
FASTREC_INLINE void online_softmax(int64_t count, T* s, const T* bias, T* top, T* column_sum) {
  using V = typename S::V;
  constexpr int NV = Gemm<S>::NV;
  V peak[NV], shift[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) peak[j] = S::load(top + j * S::lanes);
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      peak[j] = S::max(peak[j], S::load(s + i * STRIDE + j * S::lanes) + bias[i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    S::store(top + j * S::lanes, peak[j]);
    shift[j] = peak[j] == -std::numeric_limits<T>::infinity() ? V{} : peak[j];
  }
  exponentials<S, STRIDE>(
      count, s, column_sum,
      [&](int64_t i, int j, V v) __attribute__((always_inline)) { return v + bias[i] - shift[j]; },
      [](int64_t, V p) __attribute__((always_inline)) { return p; });
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_tasks(const ForwardArgs<T>& a) {
  using G = Gemm<S>;
  const Problem<T>& q = a.problem;
  Buffer<T> packed(q.width * BLOCK), tile(TILE * q.ld), s(TILE * BLOCK, T(0)), acc(BLOCK * q.ld);
  T top[BLOCK], before[BLOCK], column_sum[BLOCK], bias[TILE];
  double sum[BLOCK];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.blocks * a.ranges) {
    // Neighbouring tasks are row blocks of one range of items, which then is shared in the L3.
    int64_t range = task / a.blocks, first = task % a.blocks * a.block;
    int64_t rows = std::min(a.block, q.rows - first);
    int64_t begin = range * a.range, end = std::min(begin + a.range, q.items);
    G::pack_transposed(rows, q.width, q.x + first * q.ld, q.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * q.ld, T(0));
    std::fill_n(static_cast<T*>(tile), TILE * q.ld, T(0));
    std::fill_n(top, BLOCK, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, BLOCK, 0.0);
    for (int64_t v = begin; v < end; v += TILE) {
      int64_t count = std::min(TILE, end - v);
      for (int64_t i = 0; i < count; ++i) {
        q.weight.load(v + i, tile + i * q.ld, q.width);
        bias[i] = q.bias ? q.bias[v + i] : T(0);
      }
      std::copy_n(top, BLOCK, before);
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, q.width, tile, q.ld, packed + n * q.width, s + n);
        for (int64_t r = n; r < std::min(rows, n + G::NR); ++r) {
          int64_t y = q.target[first + r] - v;
          if (y >= 0 && y < count) a.target_logit[first + r] = s[y * BLOCK + r] + bias[y];
        }
        online_softmax<S>(count, s + n, bias, top + n, column_sum + n);
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (top[r] > before[r]) {  // about ln(V / TILE) times per row
          T scale = std::exp(before[r] - top[r]);
          sum[r] *= scale;
          for (int64_t d = 0; d < q.width; ++d) acc[r * q.ld + d] *= scale;
        }
        sum[r] += column_sum[r];
      }
      if (a.with_mean) G::accumulate(rows, count, q.width, s, tile, q.ld, acc, q.ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = range * q.rows + first + r;
      a.top[at] = top[r];
      a.sum[at] = sum[r];
      if (a.with_mean) std::copy_n(acc + r * q.ld, q.width, a.weighted + at * q.width);
    }
  }
}

// Rows [first, first + items), whose gradients are acc [items, ld] and what `u` has of them, and
// those of their biases.
template <class T>
FASTREC_INLINE void update_rows(const RowUpdate<T>& u, int64_t first, int64_t items, int64_t width,
                                T* acc, int64_t ld, const double* sum) {
  const int64_t *last = u.rows + u.count, *row = std::lower_bound(u.rows, last, first);
  for (; row < last && *row < first + items; ++row) {
    const T* grad = u.grad + (row - u.rows) * width;
    for (int64_t d = 0; d < width; ++d) acc[(*row - first) * ld + d] += grad[d];
  }
  // A number a row, or one like every number of the table.
  const int64_t step = u.mean ? width : 1;
  for (int64_t i = 0; i < items; ++i) {
    const int64_t v = first + i;
    update_row(u.how, width, acc + i * ld, u.table + v * width,
               u.square ? u.square + v * step : nullptr, u.mean ? u.mean + v * width : nullptr,
               u.rate);
    if (!u.bias) continue;
    const T grad = static_cast<T>(sum[i]);
    update_row(u.how, 1, &grad, u.bias + v, u.bias_square ? u.bias_square + v : nullptr,
               u.bias_mean ? u.bias_mean + v : nullptr, u.bias_rate);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_tasks(const BackwardArgs<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  const Problem<T>& q = a.problem;
  Buffer<T> packed(q.width * BLOCK), s(TILE * BLOCK, T(0)), acc(BLOCK * q.ld);
  T bias[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.blocks) {
    int64_t first = task * a.block, items = std::min(a.block, q.items - first);
    for (int64_t i = 0; i < items; ++i) q.weight.load(first + i, acc + i * q.ld, q.width);
    G::pack_transposed(items, q.width, acc, q.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * q.ld, T(0));
    std::fill_n(bias, BLOCK, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    if (q.bias) std::copy_n(q.bias + first, items, bias);
    for (int64_t row = 0; row < q.rows; row += TILE) {
      int64_t count = std::min(TILE, q.rows - row);
      const T* tile = q.x + row * q.ld;
      for (int64_t n = 0; n < items; n += G::NR) {
        G::scores(count, q.width, tile, q.ld, packed + n * q.width, s + n);
        exponentials<S>(
            count, s + n, column_sum + n,
            [&](int64_t i, int j, V v) __attribute__((always_inline)) {
              return v + S::load(bias + n + j * S::lanes) - a.shift[row + i];
            },
            [&](int64_t i, V p) __attribute__((always_inline)) { return p * a.grad_lse[row + i]; });
      }
      for (int64_t i = 0; i < items; ++i) sum[i] += column_sum[i];
      G::accumulate(items, count, q.width, s, tile, q.ld, acc, q.ld);
    }
    const OneHot* hot = std::lower_bound(a.one_hot, a.one_hot + q.rows, OneHot{first, 0});
    for (; hot < a.one_hot + q.rows && hot->item < first + items; ++hot) {
      int64_t i = hot->item - first;
      T grad = a.grad_target_logit[hot->row];
      const T* x = q.x + hot->row * q.ld;
      for (int64_t d = 0; d < q.width; ++d) acc[i * q.ld + d] += grad * x[d];
      sum[i] += grad;
    }
    if (a.update) {
      update_rows<T>(*a.update, first, items, q.width, acc, q.ld, sum);
      continue;
    }
    for (int64_t i = 0; i < items; ++i) {
      store_row<T>(acc + i * q.ld, a.grad_weight, a.weight_dtype, (first + i) * q.width, q.width);
      if (a.grad_bias) store_row<double>(sum + i, a.grad_bias, a.bias_dtype, first + i, 1);
    }
  }
}

FASTREC_DEFINE_PER_ISA(forward, ForwardArgs, forward_tasks)
FASTREC_DEFINE_PER_ISA(backward, BackwardArgs, backward_tasks)

}  // namespace fastrec
