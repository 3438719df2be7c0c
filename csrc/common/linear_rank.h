// SPDX-License-Identifier: Apache-2.0
// The sweep of linear_rank: how many items are ahead of the target of each row.
#pragma once

#include "linear_scores.h"

namespace fastrec {

template <class T>
struct LinearRank {
  Scores<T> scores;
  const int64_t* target;  // [N], ascending
  int64_t* ahead;         // [ranges, N], negative where the score of the target is NaN
  std::atomic<int64_t>* next;
};

// Adds up ahead(item, vector, score), 1 or 0 in every lane, over the items from ... to of a panel.
template <class S, class T = typename S::T, class Ahead>
FASTREC_INLINE void count_ahead(int64_t from, int64_t to, const T* s, const T* bias,
                                typename S::I (&count)[Gemm<S>::NV], const Ahead& ahead) {
  constexpr int NV = Gemm<S>::NV;
  for (int64_t i = from; i < to; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      count[j] += ahead(i, j, S::load(s + i * Gemm<S>::NR + j * S::lanes) + bias[i]);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void linear_rank_tasks(const LinearRank<T>& a) {
  using V = typename S::V;
  using I = typename S::I;
  using Id = typename S::C::Bits;
  constexpr int NV = Gemm<S>::NV, NR = Gemm<S>::NR;
  const I one = I{} + Id(1);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const Scores<T>& q = a.scores;
  Sweep<S> sweep(q);
  T own[BLOCK];
  Id counts[BLOCK];
  int64_t task;
  while ((task = a.next->fetch_add(1)) < q.blocks * q.ranges) {
    sweep.start(task);
    const int64_t* target = a.target + sweep.first;
    std::fill_n(own, BLOCK, nan);  // no item is ahead of a lane without a row
    std::fill_n(counts, BLOCK, Id(0));
    sweep.own_scores(target, own);
    sweep.run(nan, [&](int64_t v, int64_t count, int64_t n, const T* s,
                       const T* bias) __attribute__((always_inline)) {
      I sum[NV];
      V limit[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        std::memcpy(&sum[j], counts + n + j * S::lanes, sizeof(I));
        limit[j] = S::load(own + n + j * S::lanes);
      }
      // Equal scores are ahead before the target and behind it afterwards. Targets ascend over the
      // rows: most tiles lie before or behind all targets of a panel.
      int64_t last = std::min(n + NR, sweep.rows) - 1;
      int64_t from = std::clamp<int64_t>(target[n] - v, 0, count);
      int64_t to = std::clamp<int64_t>(target[last] + 1 - v, 0, count);
      count_ahead<S>(0, from, s, bias, sum,
                     [&](int64_t, int j, V x) __attribute__((always_inline)) -> I {
                       return x >= limit[j] ? one : I{};
                     });
      if (from < to) {
        Id place[NR];
        I y[NV];
        for (int64_t r = 0; r < NR; ++r)
          place[r] = static_cast<Id>(
              std::clamp<int64_t>(target[std::min(n + r, last)] - v, -1, SWEEP));
        std::memcpy(y, place, sizeof(y));
        count_ahead<S>(from, to, s, bias, sum,
                       [&](int64_t i, int j, V x) __attribute__((always_inline)) -> I {
                         // Selections: the compiler takes & and | of comparisons apart.
                         const I here = I{} + static_cast<Id>(i);
                         const I greater = x > limit[j] ? one : I{};
                         const I not_less = x >= limit[j] ? one : I{};
                         const I before = here < y[j] ? not_less : greater;
                         return here == y[j] ? I{} : before;
                       });
      }
      count_ahead<S>(to, count, s, bias, sum,
                     [&](int64_t, int j, V x) __attribute__((always_inline)) -> I {
                       return x > limit[j] ? one : I{};
                     });
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) std::memcpy(counts + n + j * S::lanes, &sum[j], sizeof(I));
    });
    int64_t* out = a.ahead + sweep.range * q.rows + sweep.first;
    for (int64_t r = 0; r < sweep.rows; ++r) out[r] = own[r] == own[r] ? counts[r] : -1;
  }
}

FASTREC_DEFINE_PER_ISA(linear_rank, LinearRank, linear_rank_tasks)

}  // namespace fastrec
