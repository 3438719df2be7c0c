// SPDX-License-Identifier: Apache-2.0
// The sweep of in_batch_hardest: row maximum and its position over the allowed pairs.
#pragma once

#include <atomic>

#include "in_batch_pairs.h"

namespace fastrec {

template <class T>
struct InBatchHardest {
  using Id = typename Pairs<T>::Id;
  Pairs<T> pairs;
  int64_t block, blocks, range, ranges;  // rows per task, candidates per task
  T* best;    // [ranges, N], -inf where nothing is allowed
  Id* index;  // [ranges, N], -1 there
  std::atomic<int64_t>* next;
};

// Raises the running maxima of a panel [count, NR]. Strictly greater only: ties stay at the lowest
// index.
template <class S, class T = typename S::T, class Id = typename S::C::Bits>
FASTREC_INLINE void raise_maxima(int64_t count, const T* s, const T* bias, int64_t first, T* best,
                                 Id* index) {
  using V = typename S::V;
  using I = typename S::I;
  constexpr int NV = Gemm<S>::NV;
  V peak[NV];
  I at[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    peak[j] = S::load(best + j * S::lanes);
    std::memcpy(&at[j], index + j * S::lanes, sizeof(I));
  }
  for (int64_t i = 0; i < count; ++i) {
    const I here = I{} + static_cast<Id>(first + i);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V v = S::load(s + i * BLOCK + j * S::lanes) + bias[i];
      I greater = v > peak[j];
      peak[j] = greater ? v : peak[j];
      at[j] = greater ? here : at[j];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    S::store(best + j * S::lanes, peak[j]);
    std::memcpy(index + j * S::lanes, &at[j], sizeof(I));
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void in_batch_hardest_tasks(const InBatchHardest<T>& a) {
  using G = Gemm<S>;
  using Id = typename Pairs<T>::Id;
  const Pairs<T>& q = a.pairs;
  Buffer<T> packed(q.width * BLOCK), tile(TILE * q.ld), s(TILE * BLOCK);
  Buffer<Id> lanes(q.columns * BLOCK);
  T best[BLOCK], bias[TILE];
  Id index[BLOCK];
  int64_t listed[BLOCK], task;
  while ((task = a.next->fetch_add(1)) < a.blocks * a.ranges) {
    int64_t range = task / a.blocks, first = task % a.blocks * a.block;
    int64_t rows = std::min(a.block, q.rows - first);
    int64_t begin = range * a.range, end = std::min(begin + a.range, q.items);
    G::pack_transposed(rows, q.width, q.x + first * q.ld, q.ld, packed);
    load_lanes(q.columns, first, rows, q.row_group, q.rows, static_cast<Id*>(lanes));
    if (q.listed) start_listed(q, first, rows, begin, listed);
    std::fill_n(static_cast<T*>(tile), TILE * q.ld, T(0));
    std::fill_n(best, BLOCK, OUT<T>);
    std::fill_n(index, BLOCK, Id(-1));
    for (int64_t v = begin; v < end; v += TILE) {
      int64_t count = std::min(TILE, end - v);
      for (int64_t i = 0; i < count; ++i) {
        q.candidate.load(v + i, tile + i * q.ld, q.width);
        bias[i] = q.bias ? q.bias[v + i] : T(0);
      }
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, q.width, tile, q.ld, packed + n * q.width, s + n);
        mask_groups<S>(count, s + n, q.columns, lanes + n, q.item_group + v, q.items);
      }
      if (q.listed) mask_listed(q, first, rows, v, count, listed, static_cast<T*>(s));
      for (int64_t n = 0; n < rows; n += G::NR)
        raise_maxima<S>(count, s + n, bias, v, best + n, index + n);
    }
    std::copy_n(best, rows, a.best + range * q.rows + first);
    std::copy_n(index, rows, a.index + range * q.rows + first);
  }
}

FASTREC_DEFINE_PER_ISA(in_batch_hardest, InBatchHardest, in_batch_hardest_tasks)

}  // namespace fastrec
