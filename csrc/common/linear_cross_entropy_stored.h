// SPDX-License-Identifier: Apache-2.0
// Loss and gradients in one go, with the exponentials of a chunk of rows stored: three products and
// one exponential per logit, where the two sweeps of linear_cross_entropy.h need four and two.
//
// It pays while [V, CHUNK] stays in a cache (STORED_ITEMS of the op file). Per chunk of rows: `score`
// tasks own tiles of items and store exp(s - maximum of the tile); then lse is known, and `spread`
// tasks own ranges of items, scale the stored tile to p, and add to both gradients.
#pragma once

#include "linear_cross_entropy.h"

namespace fastrec {

constexpr int64_t STORED_CHUNKS[] = {BLOCK, 32};

template <class T>
struct StoredArgs {
  Problem<T> problem;
  int64_t chunk;                // row stride of the stored tile, one of STORED_CHUNKS
  int64_t first, rows;          // this chunk: rows [first, first + rows)
  int64_t tile, tiles;          // items per tile
  int64_t range, ranges;        // tiles per range
  T* packed;                    // the chunk as panels
  T* stored;                    // [V, chunk]: exp(s - top)
  T *top, *sum;                 // [tiles, chunk]: maximum of a tile, sum of its exponentials
  T *row_top, *row_scale;       // [chunk]: maximum of a row, grad_row / its sum of exponentials
  T* target_logit;              // [chunk]
  T* partial;                   // [ranges, chunk + a register tile, ld]: gradient of x
  const T* grad_row;            // [N]
  double* loss;                 // [N]
  T* grad_x;                    // [N, ld], or null
  T *grad_weight, *grad_bias;   // [V, D], [V], zeros before the first chunk; or null
  std::atomic<int64_t>* next;
};

// Rows [first, first + count) of the table as whole register tiles: where they are if that reads
// nothing that is not of the table, else copied to `tile`.
template <class G, class T>
FASTREC_INLINE const T* item_rows(const Problem<T>& q, int64_t first, int64_t count, T* tile,
                                  int64_t& ld) {
  bool whole = q.width % G::NR == 0 && first + round_up(count, G::MR) <= q.items;
  if (whole && q.weight.dtype == compute_dtype<T>()) {
    ld = q.weight.stride / int64_t(sizeof(T));
    return reinterpret_cast<const T*>(q.weight.data + first * q.weight.stride);
  }
  for (int64_t i = 0; i < count; ++i) q.weight.load(first + i, tile + i * q.ld, q.width);
  ld = q.ld;
  return tile;
}

template <class S, int64_t CHUNK, class T = typename S::T>
FASTREC_INLINE void score_chunk(const StoredArgs<T>& a) {
  using G = Gemm<S>;
  const Problem<T>& q = a.problem;
  Buffer<T> tile((a.tile + G::MR) * q.ld);
  std::fill_n(static_cast<T*>(tile), (a.tile + G::MR) * q.ld, T(0));
  T bias[TILE];
  std::fill_n(bias, TILE, T(0));
  int64_t task;
  while ((task = a.next->fetch_add(1)) < a.tiles) {
    int64_t v = task * a.tile, count = std::min(a.tile, q.items - v);
    int64_t ld;
    const T* w = item_rows<G>(q, v, count, static_cast<T*>(tile), ld);
    if (q.bias) std::copy_n(q.bias + v, count, bias);
    T *s = a.stored + v * CHUNK, *top = a.top + task * CHUNK, *sum = a.sum + task * CHUNK;
    std::fill_n(top, CHUNK, -std::numeric_limits<T>::infinity());
    for (int64_t n = 0; n < a.rows; n += G::NR) {
      // Whole register tiles: the scores of up to MR - 1 rows behind this tile are written again by
      // the task that owns them, so this one keeps to its own.
      int64_t whole = count / G::MR * G::MR;
      const T* panel = a.packed + n * q.width;
      G::template scores<CHUNK>(whole, q.width, w, ld, panel, s + n);
      if (whole < count) {
        T rest[G::MR * CHUNK];
        G::template scores<CHUNK>(count - whole, q.width, w + whole * ld, ld, panel, rest);
        for (int64_t i = whole; i < count; ++i)
          std::copy_n(rest + (i - whole) * CHUNK, G::NR, s + i * CHUNK + n);
      }
      for (int64_t r = n; r < std::min(a.rows, n + G::NR); ++r) {
        int64_t y = q.target[a.first + r] - v;
        if (y >= 0 && y < count) a.target_logit[r] = s[y * CHUNK + r] + bias[y];
      }
      online_softmax<S, CHUNK>(count, s + n, bias, top + n, sum + n);
    }
  }
}

template <class S, int64_t CHUNK, class T = typename S::T>
FASTREC_INLINE void spread_chunk(const StoredArgs<T>& a) {
  using G = Gemm<S>;
  const Problem<T>& q = a.problem;
  Buffer<T> tile(a.tile * q.ld), p((a.tile + G::MR) * CHUNK), grad((a.tile + G::MR) * q.ld);
  std::fill_n(static_cast<T*>(p), (a.tile + G::MR) * CHUNK, T(0));
  T scale[CHUNK];
  const T* x = q.x + a.first * q.ld;
  int64_t lanes = round_up(a.rows, S::lanes), task;
  while ((task = a.next->fetch_add(1)) < a.ranges) {
    T* acc = a.partial + task * (CHUNK + 12) * q.ld;
    if (a.grad_x) std::fill_n(acc, (CHUNK + 12) * q.ld, T(0));
    int64_t last = std::min((task + 1) * a.range, a.tiles);
    for (int64_t t = task * a.range; t < last; ++t) {
      int64_t v = t * a.tile, count = std::min(a.tile, q.items - v);
      const T *s = a.stored + v * CHUNK, *top = a.top + t * CHUNK;
      for (int64_t r = 0; r < lanes; r += S::lanes) {
        typename S::V e[1] = {S::load(top + r) - S::load(a.row_top + r)};
        S::exp(e);
        S::store(scale + r, e[0] * S::load(a.row_scale + r));
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < lanes; r += S::lanes)
          S::store(p + i * CHUNK + r, S::load(s + i * CHUNK + r) * S::load(scale + r));
      }
      for (int64_t r = 0; r < a.rows; ++r) {
        int64_t y = q.target[a.first + r] - v;
        if (y >= 0 && y < count) p[y * CHUNK + r] -= a.grad_row[a.first + r];
      }
      if (a.grad_x) {
        int64_t ld;
        const T* w = item_rows<G>(q, v, count, static_cast<T*>(tile), ld);
        G::template accumulate<1, CHUNK>(a.rows, count, q.width, p, w, ld, acc, q.ld);
      }
      if (a.grad_bias) {
        for (int64_t i = 0; i < count; ++i) {
          double total = a.grad_bias[v + i];
          for (int64_t r = 0; r < a.rows; ++r) total += p[i * CHUNK + r];
          a.grad_bias[v + i] = static_cast<T>(total);
        }
      }
      if (!a.grad_weight) continue;
      T* out = a.grad_weight + v * q.width;
      if (q.width % G::NR == 0 && count % G::MR == 0) {
        G::template accumulate<CHUNK, 1>(count, a.rows, q.width, p, x, q.ld, out, q.width);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) std::copy_n(out + i * q.width, q.width, grad + i * q.ld);
      G::template accumulate<CHUNK, 1>(count, a.rows, q.width, p, x, q.ld, grad, q.ld);
      for (int64_t i = 0; i < count; ++i) std::copy_n(grad + i * q.ld, q.width, out + i * q.width);
    }
  }
}

// Between the two: the tiles of a row are put together, in order.
template <class S, class T = typename S::T>
FASTREC_INLINE void join_tiles(const StoredArgs<T>& a) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  int64_t lanes = round_up(a.rows, S::lanes);
  Buffer<double> total(lanes);
  std::fill_n(static_cast<double*>(total), lanes, 0.0);
  std::fill_n(a.row_top, lanes, lowest);
  for (int64_t t = 0; t < a.tiles; ++t) {
    const T* top = a.top + t * a.chunk;
    for (int64_t r = 0; r < lanes; ++r) a.row_top[r] = std::max(a.row_top[r], top[r]);
  }
  for (int64_t r = 0; r < lanes; ++r) a.row_top[r] = finite_shift(a.row_top[r]);
  for (int64_t t = 0; t < a.tiles; ++t) {
    for (int64_t r = 0; r < lanes; r += S::lanes) {
      int64_t at = t * a.chunk + r;
      typename S::V e[1] = {S::load(a.top + at) - S::load(a.row_top + r)};
      S::exp(e);
      e[0] *= S::load(a.sum + at);
      for (int64_t i = 0; i < S::lanes; ++i) total[r + i] += e[0][i];
    }
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    double lse = a.row_top[r] + std::log(total[r]);
    a.loss[a.first + r] = std::max(lse, double(a.target_logit[r])) - a.target_logit[r];
    a.row_scale[r] = static_cast<T>(total[r] == 0 ? 0 : a.grad_row[a.first + r] / total[r]);
  }
  for (int64_t r = a.rows; r < lanes; ++r) a.row_scale[r] = 0;
}

template <class S, class T = typename S::T>
FASTREC_INLINE void score_tasks(const StoredArgs<T>& a) {
  a.chunk == BLOCK ? score_chunk<S, BLOCK>(a) : score_chunk<S, STORED_CHUNKS[1]>(a);
}

template <class S, class T = typename S::T>
FASTREC_INLINE void spread_tasks(const StoredArgs<T>& a) {
  a.chunk == BLOCK ? spread_chunk<S, BLOCK>(a) : spread_chunk<S, STORED_CHUNKS[1]>(a);
}

// Panels of the chunk's rows.
template <class S, class T = typename S::T>
FASTREC_INLINE void pack_rows(const StoredArgs<T>& a) {
  const Problem<T>& q = a.problem;
  Gemm<S>::pack_transposed(a.rows, q.width, q.x + a.first * q.ld, q.ld, a.packed);
}

FASTREC_DEFINE_PER_ISA(begin_chunk, StoredArgs, pack_rows)
FASTREC_DEFINE_PER_ISA(score, StoredArgs, score_tasks)
FASTREC_DEFINE_PER_ISA(end_score, StoredArgs, join_tiles)
FASTREC_DEFINE_PER_ISA(spread, StoredArgs, spread_tasks)

template <class T>
void end_spread(const StoredArgs<T>& a) {
  if (!a.grad_x) return;
  const Problem<T>& q = a.problem;
  for (int64_t r = 0; r < a.rows; ++r) {
    T* out = a.grad_x + (a.first + r) * q.ld;
    std::fill_n(out, q.width, T(0));
    for (int64_t range = 0; range < a.ranges; ++range) {
      const T* part = a.partial + (range * (a.chunk + 12) + r) * q.ld;
      for (int64_t d = 0; d < q.width; ++d) out[d] += part[d];
    }
  }
}

}  // namespace fastrec
