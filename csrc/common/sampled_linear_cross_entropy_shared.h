// SPDX-License-Identifier: Apache-2.0
// sampled_linear_cross_entropy, the same negatives for all rows: tiles of a matrix product, as in
// linear_cross_entropy.h.
#pragma once

#include "sampled_linear_cross_entropy.h"

namespace fastrec {

// The hits of item y among shared negatives [first, first + count): at(place).
template <class T, class At>
FASTREC_INLINE void for_hits(const SampledArgs<T>& a, int64_t y, int64_t first, int64_t count,
                             const At& at) {
  const Hit* end = a.sorted + a.negatives;
  for (const Hit* hit = std::lower_bound(a.sorted, end, Hit{y, first});
       hit < end && hit->item == y && hit->place < first + count; ++hit)
    at(hit->place - first);
}

// softplus and sigmoid of a panel [count, NR]; lanes are rows, whose losses are added up.
template <class S, class T = typename S::T>
FASTREC_INLINE void binary_panel(int64_t count, T* s, const T* offset, T scale, double* loss) {
  using V = typename S::V;
  alignas(64) T e[S::lanes], positive[S::lanes];
  for (int j = 0; j < Gemm<S>::NV; ++j) {
    for (int64_t first = 0; first < count; first += LINE) {
      double product[S::lanes], above[S::lanes];
      std::fill_n(product, S::lanes, 1.0);
      std::fill_n(above, S::lanes, 0.0);
      for (int64_t i = first; i < std::min(count, first + LINE); ++i) {
        T* at = s + i * BLOCK + j * S::lanes;
        V v = S::load(at) + offset[i];
        S::store(positive, v > V{} ? v : V{});
        S::store(e, sigmoid<S>(v, scale));
        S::store(at, v);
        for (int l = 0; l < S::lanes; ++l) product[l] *= 1.0 + e[l], above[l] += positive[l];
      }
      for (int l = 0; l < S::lanes; ++l)
        loss[j * S::lanes + l] += above[l] + std::log(product[l]);
    }
  }
}

// Blocks [begin, end) of BLOCK rows, shared negatives.
template <class S, class T = typename S::T>
FASTREC_INLINE void shared_forward_blocks(const SampledArgs<T>& a) {
  using G = Gemm<S>;
  const int64_t width = round_up(a.width, S::lanes);
  const T minus_inf = -std::numeric_limits<T>::infinity();
  Buffer<T> packed(a.width * BLOCK), scores(TILE * BLOCK, T(0)), acc(BLOCK * a.ld), row(a.ld);
  T *s = scores, *target_row = row;
  T top[BLOCK], before[BLOCK], column_sum[BLOCK];
  alignas(64) T score[S::lanes];
  double sum[BLOCK];
  for (int64_t first = a.begin * BLOCK; first < std::min(a.end * BLOCK, a.rows); first += BLOCK) {
    const int64_t rows = std::min(BLOCK, a.rows - first);
    G::pack_transposed(rows, a.width, a.x + first * a.ld, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(target_row, a.ld, T(0));
    std::fill_n(top, BLOCK, minus_inf);
    std::fill_n(sum, BLOCK, 0.0);
    for (int64_t v = 0; v < a.negatives; v += TILE) {
      const int64_t count = std::min(TILE, a.negatives - v);
      const T* tile = a.shared + v * a.ld;
      std::copy_n(top, BLOCK, before);
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
        for (int64_t r = n; r < std::min(rows, n + G::NR); ++r)
          for_hits(a, a.target[first + r], v, count, [&](int64_t at) __attribute__((always_inline)) {
            s[at * BLOCK + r] = minus_inf;
          });
        if (a.beta < 0)
          online_softmax<S>(count, s + n, a.shared_offset + v, top + n, column_sum + n);
        else
          binary_panel<S>(count, s + n, a.shared_offset + v,
                          T(1) / static_cast<T>(a.negatives + 1), sum + n);
      }
      for (int64_t r = 0; r < rows && a.beta < 0; ++r) {
        if (top[r] > before[r]) {
          T fade = std::exp(before[r] - top[r]);
          sum[r] *= fade;
          for (int64_t d = 0; d < a.width; ++d) acc[r * a.ld + d] *= fade;
        }
        sum[r] += column_sum[r];
      }
      if (a.grad_input) G::accumulate(rows, count, a.width, s, tile, a.ld, acc, a.ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r, y = a.target[i];
      T* out = a.grad_input ? a.grad_input + i * a.width : nullptr;
      if (y < 0) {
        a.loss[i] = a.grad_target[i] = a.lse[i] = a.left_out[i] = T(0);
        if (out) std::fill_n(out, a.width, T(0));
        continue;
      }
      a.weight.load(y, target_row, a.width);
      const T* only = target_row;
      row_scores<S>(1, width, a.x + i * a.ld, &only, score);
      const double target = score[0] + a.offset(y);
      T scale = T(1);
      if (a.beta < 0)
        finish_softmax({top[r], sum[r]}, target, a.loss[i], a.grad_target[i], a.lse[i],
                       a.left_out[i], scale);
      else
        finish_binary(a, sum[r], target, a.loss[i], a.grad_target[i]), a.lse[i] = a.left_out[i] = T(0);
      for (int64_t d = 0; out && d < a.width; ++d)
        out[d] = acc[r * a.ld + d] * scale + a.grad_target[i] * target_row[d];
    }
  }
}

// Blocks [begin, end) of BLOCK shared negatives: their rows of the gradient.
template <class S, class T = typename S::T>
FASTREC_INLINE void shared_backward_blocks(const SampledArgs<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  const T minus_inf = -std::numeric_limits<T>::infinity();
  const T share = T(1) / static_cast<T>(a.negatives + 1);
  Buffer<T> packed(a.width * BLOCK), scores(TILE * BLOCK, T(0)), acc(BLOCK * a.ld);
  T* s = scores;
  T offset[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  for (int64_t first = a.begin * BLOCK; first < std::min(a.end * BLOCK, a.negatives);
       first += BLOCK) {
    const int64_t items = std::min(BLOCK, a.negatives - first);
    G::pack_transposed(items, a.width, a.shared + first * a.ld, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(offset, BLOCK, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    std::copy_n(a.shared_offset + first, items, offset);
    for (int64_t row = 0; row < a.rows; row += TILE) {
      const int64_t count = std::min(TILE, a.rows - row);
      const T* tile = a.x + row * a.ld;
      for (int64_t n = 0; n < items; n += G::NR)
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
      for (int64_t i = 0; i < count; ++i)
        for_hits(a, a.target[row + i], first, items,
                 [&](int64_t at) __attribute__((always_inline)) { s[i * BLOCK + at] = minus_inf; });
      for (int64_t n = 0; n < items; n += G::NR) {
        if (a.beta < 0) {
          exponentials<S>(
              count, s + n, column_sum + n,
              [&](int64_t i, int j, V v) __attribute__((always_inline)) {
                return v + S::load(offset + n + j * S::lanes) - a.lse[row + i];
              },
              [&](int64_t i, V p) __attribute__((always_inline)) {
                return p * a.grad_loss[row + i];
              });
          continue;
        }
        for (int j = 0; j < G::NV; ++j) {
          V total = {};
          for (int64_t i = 0; i < count; ++i) {
            T* at = s + i * BLOCK + n + j * S::lanes;
            V v = S::load(at) + S::load(offset + n + j * S::lanes);
            sigmoid<S>(v, share * a.grad_loss[row + i]);
            S::store(at, v);
            total += v;
          }
          S::store(column_sum + n + j * S::lanes, total);
        }
      }
      for (int64_t i = 0; i < items; ++i) sum[i] += column_sum[i];
      G::accumulate(items, count, a.width, s, tile, a.ld, acc, a.ld);
    }
    for (int64_t i = 0; i < items; ++i) {
      std::copy_n(acc + i * a.ld, a.ld, a.grad_shared + (first + i) * a.ld);
      a.grad_offset[first + i] = static_cast<T>(sum[i]);
    }
  }
}

FASTREC_DEFINE_PER_ISA(shared_forward, SampledArgs, shared_forward_blocks)
FASTREC_DEFINE_PER_ISA(shared_backward, SampledArgs, shared_backward_blocks)

}  // namespace fastrec
