// SPDX-License-Identifier: Apache-2.0
// The sweep of linear_topk: candidates for the k best items of each row.
#pragma once

#include "linear_scores.h"

namespace fastrec {

template <class T>
struct Candidate {
  T score;
  typename Simd<T, 16>::C::Bits item;  // counted from the first of its range

  // Best first: by score, then by id. No score is NaN.
  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && item < other.item);
  }
};

template <class T>
struct LinearTopk {
  Scores<T> scores;
  int64_t k;
  Candidate<T>* best;  // [ranges, N, k]
  int64_t* count;      // [ranges, N]: how many of the k there are
  // [N]: a score that k items of some range reach, or -inf. What a task reads there depends on
  // which other tasks have run, and saves it candidates that cannot be among the k best of all
  // ranges: the result does not depend on it.
  std::atomic<T>* bound;
  std::atomic<int64_t>* next;
};

// The largest score of every lane of a panel [count, NR]; NaN is not larger than anything.
template <class S, class T = typename S::T>
FASTREC_INLINE void largest(int64_t count, const T* s, const T* bias, T* out) {
  constexpr int NV = Gemm<S>::NV;
  typename S::V peak[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) peak[j] = typename S::V{} - std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      typename S::V v = S::load(s + i * Gemm<S>::NR + j * S::lanes) + bias[i];
      peak[j] = v > peak[j] ? v : peak[j];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) S::store(out + j * S::lanes, peak[j]);
}

// The candidates of one row in a range.
template <class T>
struct Shortlist {
  Candidate<T>* at;
  int64_t k, room, count;
  T limit;  // -inf, or the k-th best score of the range when the list was last full
  T bound;  // see LinearTopk

  // Items come in ascending order, so an equal score does not enter a full list; items of another
  // range may have higher ids, and an equal score may displace theirs.
  FASTREC_INLINE bool wants(T score) const { return score > limit && score >= bound; }

  // Out of line: seldom called, and the loops around the call keep their registers.
  __attribute__((noinline)) void add(T score, int64_t item, std::atomic<T>& shared) {
    at[count++] = {score, static_cast<decltype(at->item)>(item)};
    if (count == room) shorten(shared);
  }
  void shorten(std::atomic<T>& shared) {
    if (count < k) return;
    std::nth_element(at, at + k - 1, at + count);
    count = k;
    limit = at[k - 1].score;
    bound = shared.load(std::memory_order_relaxed);
    if (limit > bound) shared.store(limit, std::memory_order_relaxed);
  }
};

// The places of the scores above `limit` and not below `bound` in lane `r` of a panel [count, NR];
// how many there are.
template <int64_t NR, class T>
FASTREC_INLINE int64_t above(T limit, T bound, int64_t count, const T* s, const T* bias, int64_t r,
                             int64_t* place) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {  // no branch to mispredict
    place[found] = i;
    T score = s[i * NR + r] + bias[i];
    found += (score > limit) & (score >= bound);
  }
  return found;
}

// The sweep of a call of few rows: items are in the lanes, and a table of T is read where it lies.
template <class S, class T = typename S::T>
FASTREC_INLINE void few_rows(const LinearTopk<T>& a, Sweep<S>& sweep, Shortlist<T>* rows) {
  using V = typename S::V;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Scores<T>& q = a.scores;
  const bool lies = q.weight.dtype == compute_dtype<T>() && q.width % S::lanes == 0;
  T score[SWEEP];
  for (int64_t v = sweep.begin; v < sweep.end; v += SWEEP) {
    const int64_t count = std::min(SWEEP, sweep.end - v);
    const T* item = sweep.tile;
    int64_t ld = q.ld;
    if (lies && count == SWEEP) {
      item = reinterpret_cast<const T*>(q.weight.data + v * q.weight.stride);
      ld = q.weight.stride / int64_t(sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) q.weight.load(v + i, sweep.tile + i * q.ld, q.width);
    }
    for (int64_t r = 0; r < sweep.rows; ++r) {
      V peak = V{} - inf;
      for (int64_t i = 0; i < SWEEP; i += S::lanes)
        S::store(score + i, sweep.few(item + i * ld, ld, r));
      if (q.bias) {
        for (int64_t i = 0; i < count; ++i) score[i] += q.bias[v + i];
      }
      if (q.listed) sweep.leave_out(v, count, r, [&](int64_t i) { score[i] = -inf; });
      for (int64_t i = count; i < SWEEP; ++i) score[i] = -inf;
      for (int64_t i = 0; i < SWEEP; i += S::lanes) peak = S::max(S::load(score + i), peak);
      Shortlist<T>& row = rows[r];
      if (!row.wants(reduce<S>(peak, [](auto x, auto y) { return x > y ? x : y; }))) continue;
      for (int64_t i = 0; i < count; ++i) {
        if (row.wants(score[i])) row.add(score[i], v + i - sweep.begin, a.bound[sweep.first + r]);
      }
    }
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void linear_topk_tasks(const LinearTopk<T>& a) {
  constexpr int64_t NR = Gemm<S>::NR;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Scores<T>& q = a.scores;
  Sweep<S> sweep(q);
  // Room to collect before the list is cut back: half of the time spent there, at k = 100.
  const int64_t room = a.k + std::max<int64_t>(a.k, 16);
  Buffer<Candidate<T>> lists(q.block * room);
  Shortlist<T> rows[BLOCK];
  T peak[NR];
  int64_t place[SWEEP];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < q.blocks * q.ranges) {
    sweep.start(task);
    for (int64_t r = 0; r < sweep.rows; ++r)
      rows[r] = {lists + r * room, a.k, room, 0, -inf,
                 a.bound[sweep.first + r].load(std::memory_order_relaxed)};
    if (q.rows <= FEW) {
      few_rows<S>(a, sweep, rows);
    } else {
      sweep.run(-inf, [&](int64_t v, int64_t count, int64_t n, const T* s,
                          const T* bias) __attribute__((always_inline)) {
        largest<S>(count, s, bias, peak);
        for (int64_t r = 0; r < std::min(NR, sweep.rows - n); ++r) {
          Shortlist<T>& row = rows[n + r];
          if (!row.wants(peak[r])) continue;
          int64_t found = above<NR>(row.limit, row.bound, count, s, bias, r, place);
          for (int64_t f = 0; f < found; ++f) {
            T score = s[place[f] * NR + r] + bias[place[f]];
            if (row.wants(score))
              row.add(score, v + place[f] - sweep.begin, a.bound[sweep.first + n + r]);
          }
        }
      });
    }
    for (int64_t r = 0; r < sweep.rows; ++r) {
      rows[r].shorten(a.bound[sweep.first + r]);
      int64_t out = sweep.range * q.rows + sweep.first + r;
      std::copy_n(rows[r].at, rows[r].count, a.best + out * a.k);
      a.count[out] = rows[r].count;
    }
  }
}

FASTREC_DEFINE_PER_ISA(linear_topk, LinearTopk, linear_topk_tasks)

}  // namespace fastrec
