// SPDX-License-Identifier: Apache-2.0
// Scores of rows against all items, one tile at a time: what linear_rank and linear_topk share.
//
// Legend: N rows, V items, D width, ld = padded<T>(D). A block of rows stays, items stream by. A
// panel is the scores of a tile for the rows in NR vector lanes: [items, NR], as in gemm.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "convert.h"
#include "gemm.h"
#include "simd.h"
#include "small_gemm.h"

namespace fastrec {

// Items of a tile. The rows of a block, a tile and a panel together fill the L1 cache at D = 64.
constexpr int64_t SWEEP = 48;
static_assert(SWEEP % 12 == 0 && SWEEP >= 32, "whole register tiles, at least a panel of rows");
// Calls of up to so many rows multiply them one by one, with items in the lanes: most lanes of a panel
// would be empty. A request that serves one user is one row.
constexpr int64_t FEW = 4;
// Bytes ahead of what is read of a table: memory answers late, and the processor's own prefetching
// ends with a page. A table that no cache holds is read in 0.75 of the time.
constexpr int64_t AHEAD = 8192;

template <class T>
struct Scores {
  int64_t rows, items, width, ld;
  const T* x;     // [N, ld]
  Rows weight;    // [V, D]
  const T* bias;  // [V] or null
  // Excluded items of row i: listed[list_begin[i] ... list_end[i]], sorted. Null: none.
  const int64_t* listed;
  const int64_t* list_begin;
  const int64_t* list_end;
  int64_t block, blocks, range, ranges;  // rows per task, items per task
};

// A task: a block of rows against a range of items.
template <class S>
struct Sweep {
  using T = typename S::T;
  using G = Gemm<S>;

  explicit Sweep(const Scores<T>& scores)
      : q(scores), packed(q.width * BLOCK), tile(SWEEP * q.ld), s(SWEEP * G::NR) {
    std::fill_n(static_cast<T*>(tile), SWEEP * q.ld, T(0));
    std::fill_n(static_cast<T*>(s), SWEEP * G::NR, T(0));
  }

  FASTREC_INLINE void start(int64_t task) {
    // Neighbouring tasks are row blocks of one range of items, which then is shared in the L3.
    range = task / q.blocks, first = task % q.blocks * q.block;
    rows = std::min(q.block, q.rows - first);
    begin = range * q.range, end = std::min(begin + q.range, q.items);
    if (q.rows > FEW) G::pack_transposed(rows, q.width, q.x + first * q.ld, q.ld, packed);
    if (!q.listed) return;
    for (int64_t r = 0; r < rows; ++r) {
      next[r] = std::lower_bound(q.listed + q.list_begin[first + r],
                                 q.listed + q.list_end[first + r], begin) - q.listed;
    }
  }

  FASTREC_INLINE void load(int64_t item, int64_t i) {
    q.weight.load(item, tile + i * q.ld, q.width);
    bias[i] = q.bias ? q.bias[item] : T(0);
  }

  FASTREC_INLINE void multiply(int64_t count, int64_t n) {
    if (q.rows <= FEW) return multiply_few(count);
    G::template scores<G::NR>(count, q.width, tile, q.ld, packed + n * q.width, s);
  }

  FASTREC_INLINE void multiply_few(int64_t count) {
    for (int64_t i = 0; i < count; i += S::lanes) {
      for (int64_t r = 0; r < rows; ++r) {
        typename S::V products = few(tile + i * q.ld, q.ld, r);
        for (int64_t j = 0; j < S::lanes; ++j) s[(i + j) * G::NR + r] = products[j];
      }
    }
  }

  // The products of as many items as a vector has lanes, `ld` apart, with row r of the block. Rows of
  // x are 0 from the width up to whole vectors; those of the items are finite there.
  FASTREC_INLINE typename S::V few(const T* item, int64_t ld, int64_t r) const {
    const T* x = q.x + (first + r) * q.ld;
    typename S::V sum[S::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::lanes; ++i) {
      sum[i] = typename S::V{};
      for (int64_t k = 0; k < q.width; k += S::lanes) {
        const T* at = item + i * ld + k;
        __builtin_prefetch(at + AHEAD / sizeof(T));
        sum[i] += S::load(x + k) * S::load(at);
      }
    }
    return transposed_sums<S>(sum);
  }

  // out[r] = score of item[r] for row r of the block: the additions are those of the sweep in the
  // same order, so equal item vectors have equal scores.
  FASTREC_INLINE void own_scores(const int64_t* item, T* out) {
    for (int64_t n = 0; n < rows; n += G::NR) {
      int64_t count = std::min<int64_t>(G::NR, rows - n);
      for (int64_t i = 0; i < count; ++i) load(item[n + i], i);
      multiply(count, n);
      for (int64_t i = 0; i < count; ++i) out[n + i] = s[i * G::NR + i] + bias[i];
    }
  }

  // panel(v, count, n, s, bias): `s` holds the products of items v ... v + count with the rows from
  // n on, `left_out` for the listed pairs; the score is s + bias.
  template <class Panel>
  FASTREC_INLINE void run(T left_out, const Panel& panel) {
    for (int64_t v = begin; v < end; v += SWEEP) {
      int64_t count = std::min(SWEEP, end - v);
      for (int64_t i = 0; i < count; ++i) load(v + i, i);
      for (int64_t n = 0; n < rows; n += G::NR) {
        multiply(count, n);
        if (q.listed) {
          for (int64_t r = n; r < std::min<int64_t>(n + G::NR, rows); ++r)
            leave_out(v, count, r, [&](int64_t i) { s[i * G::NR + r - n] = left_out; });
        }
        panel(v, count, n, static_cast<const T*>(s), static_cast<const T*>(bias));
      }
    }
  }

  // leave(i) for the listed items of row r, counted from item v of a tile.
  template <class Leave>
  FASTREC_INLINE void leave_out(int64_t v, int64_t count, int64_t r, const Leave& leave) {
    int64_t at = next[r], last = q.list_end[first + r];
    for (; at < last && q.listed[at] < v + count; ++at) leave(q.listed[at] - v);
    next[r] = at;
  }

  const Scores<T>& q;
  Buffer<T> packed, tile, s;
  T bias[SWEEP];
  int64_t next[BLOCK];
  int64_t range, first, rows, begin, end;
};

}  // namespace fastrec
