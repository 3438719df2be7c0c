// SPDX-License-Identifier: Apache-2.0
// The two sweeps of in_batch_cross_entropy, free of torch types except the dtype of a row.
//
// As in linear_cross_entropy.h, forward tasks own rows and stream candidates, backward tasks own
// candidates and stream rows. The positive is kept out of the softmax sum: the loss is
// log(1 + sum_j exp(s_j - s_positive)), exactly 0 when every other candidate is left out, and
// accurate when it is small.
#pragma once

#include "in_batch_pairs.h"
#include "linear_cross_entropy.h"

namespace fastrec {

template <class T>
struct InBatchForward {
  Pairs<T> pairs;
  bool with_direction;
  int64_t block, blocks, range, ranges;  // rows per task, candidates per task
  // Per range and row, without the positive: maximum, sum of exp(s - max), sum of exp(s - max) c.
  T* top;             // [ranges, N]
  double* sum;        // [ranges, N]
  T* weighted;        // [ranges, N, D]
  T* positive_logit;  // [N]
  std::atomic<int64_t>* next;
};

template <class T>
struct InBatchBackward {
  Pairs<T> pairs;
  int64_t block, blocks;     // candidates per task
  const T* lse;              // [N], rounded
  const T* grad;             // [N]: gradient of the loss, times what the rounding of lse left out
  const T* grad_positive;    // [N]: -grad (1 - p_positive)
  const Excluded* excluded;  // listed pairs by block of candidates, then by row
  const int64_t* excluded_begin;  // [blocks + 1]
  T* grad_candidate;         // [C, D]
  T* grad_bias;              // [C] or null
  std::atomic<int64_t>* next;
};

template <class S, class T = typename S::T>
FASTREC_INLINE void in_batch_forward_tasks(const InBatchForward<T>& a) {
  using G = Gemm<S>;
  using Id = typename Pairs<T>::Id;
  const Pairs<T>& q = a.pairs;
  Buffer<T> packed(q.width * BLOCK), tile(TILE * q.ld), s(TILE * BLOCK, T(0)), acc(BLOCK * q.ld);
  Buffer<Id> lanes(q.columns * BLOCK);
  T top[BLOCK], before[BLOCK], column_sum[BLOCK], bias[TILE];
  double sum[BLOCK];
  int64_t listed[BLOCK], task;
  while ((task = a.next->fetch_add(1)) < a.blocks * a.ranges) {
    int64_t range = task / a.blocks, first = task % a.blocks * a.block;
    int64_t rows = std::min(a.block, q.rows - first);
    int64_t begin = range * a.range, end = std::min(begin + a.range, q.items);
    G::pack_transposed(rows, q.width, q.x + first * q.ld, q.ld, packed);
    load_lanes(q.columns, first, rows, q.row_group, q.rows, static_cast<Id*>(lanes));
    if (q.listed) start_listed(q, first, rows, begin, listed);
    std::fill_n(static_cast<T*>(acc), BLOCK * q.ld, T(0));
    std::fill_n(static_cast<T*>(tile), TILE * q.ld, T(0));
    std::fill_n(top, BLOCK, OUT<T>);
    std::fill_n(sum, BLOCK, 0.0);
    for (int64_t v = begin; v < end; v += TILE) {
      int64_t count = std::min(TILE, end - v);
      for (int64_t i = 0; i < count; ++i) {
        q.candidate.load(v + i, tile + i * q.ld, q.width);
        bias[i] = q.bias ? q.bias[v + i] : T(0);
      }
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, q.width, tile, q.ld, packed + n * q.width, s + n);
        for (int64_t r = n; r < std::min(rows, n + G::NR); ++r) {
          int64_t y = q.positive[first + r] - v;
          if (y < 0 || y >= count) continue;
          a.positive_logit[first + r] = s[y * BLOCK + r] + bias[y];
          s[y * BLOCK + r] = OUT<T>;
        }
        mask_groups<S>(count, s + n, q.columns, lanes + n, q.item_group + v, q.items);
      }
      if (q.listed) mask_listed(q, first, rows, v, count, listed, static_cast<T*>(s));
      std::copy_n(top, BLOCK, before);
      for (int64_t n = 0; n < rows; n += G::NR)
        online_softmax<S>(count, s + n, bias, top + n, column_sum + n);
      for (int64_t r = 0; r < rows; ++r) {
        if (top[r] > before[r]) {  // about ln(C / TILE) times per row
          T scale = std::exp(before[r] - top[r]);
          sum[r] *= scale;
          for (int64_t d = 0; d < q.width; ++d) acc[r * q.ld + d] *= scale;
        }
        sum[r] += column_sum[r];
      }
      if (a.with_direction) G::accumulate(rows, count, q.width, s, tile, q.ld, acc, q.ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = range * q.rows + first + r;
      a.top[at] = top[r];
      a.sum[at] = sum[r];
      if (a.with_direction) std::copy_n(acc + r * q.ld, q.width, a.weighted + at * q.width);
    }
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void in_batch_backward_tasks(const InBatchBackward<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  using Id = typename Pairs<T>::Id;
  const Pairs<T>& q = a.pairs;
  Buffer<T> packed(q.width * BLOCK), s(TILE * BLOCK, T(0)), acc(BLOCK * q.ld);
  Buffer<Id> lanes(q.columns * BLOCK);
  T bias[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.blocks) {
    int64_t first = task * a.block, items = std::min(a.block, q.items - first);
    for (int64_t i = 0; i < items; ++i) q.candidate.load(first + i, acc + i * q.ld, q.width);
    G::pack_transposed(items, q.width, acc, q.ld, packed);
    load_lanes(q.columns, first, items, q.item_group, q.items, static_cast<Id*>(lanes));
    std::fill_n(static_cast<T*>(acc), BLOCK * q.ld, T(0));
    std::fill_n(bias, BLOCK, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    if (q.bias) std::copy_n(q.bias + first, items, bias);
    int64_t listed = q.listed ? a.excluded_begin[task] : 0;
    int64_t listed_end = q.listed ? a.excluded_begin[task + 1] : 0;
    for (int64_t row = 0; row < q.rows; row += TILE) {
      int64_t count = std::min(TILE, q.rows - row);
      const T* tile = q.x + row * q.ld;
      for (int64_t n = 0; n < items; n += G::NR) {
        G::scores(count, q.width, tile, q.ld, packed + n * q.width, s + n);
        mask_groups<S>(count, s + n, q.columns, lanes + n, q.row_group + row, q.rows);
      }
      for (; listed < listed_end && a.excluded[listed].row < row + count; ++listed)
        s[(a.excluded[listed].row - row) * BLOCK + a.excluded[listed].item - first] = OUT<T>;
      for (int64_t i = 0; i < count; ++i) {
        int64_t y = q.positive[row + i] - first;
        if (y >= 0 && y < items) s[i * BLOCK + y] = OUT<T>;
      }
      for (int64_t n = 0; n < items; n += G::NR) {
        exponentials<S>(
            count, s + n, column_sum + n,
            [&](int64_t i, int j, V v) __attribute__((always_inline)) {
              return v + S::load(bias + n + j * S::lanes) - a.lse[row + i];
            },
            [&](int64_t i, V p) __attribute__((always_inline)) { return p * a.grad[row + i]; });
      }
      for (int64_t i = 0; i < items; ++i) sum[i] += column_sum[i];
      for (int64_t i = 0; i < count; ++i) {
        int64_t y = q.positive[row + i] - first;
        if (y < 0 || y >= items) continue;
        s[i * BLOCK + y] = a.grad_positive[row + i];
        sum[y] += a.grad_positive[row + i];
      }
      G::accumulate(items, count, q.width, s, tile, q.ld, acc, q.ld);
    }
    for (int64_t i = 0; i < items; ++i) {
      std::copy_n(acc + i * q.ld, q.width, a.grad_candidate + (first + i) * q.width);
      if (a.grad_bias) a.grad_bias[first + i] = static_cast<T>(sum[i]);
    }
  }
}

FASTREC_DEFINE_PER_ISA(in_batch_forward, InBatchForward, in_batch_forward_tasks)
FASTREC_DEFINE_PER_ISA(in_batch_backward, InBatchBackward, in_batch_backward_tasks)

}  // namespace fastrec
