// SPDX-License-Identifier: Apache-2.0
// The pairs of an in-batch op and the rules that leave some of them out, applied to score tiles.
//
// Legend: N scored queries, C candidates, D width, G id columns, ld = padded<T>(D). A tile of scores
// is [streamed side, BLOCK lanes of the stationary side], as in gemm.h.
#pragma once

#include <cstdint>
#include <limits>

#include "convert.h"
#include "gemm.h"
#include "simd.h"

namespace fastrec {

// A listed exclusion of a block of candidates.
struct Excluded {
  int64_t row, item;
};

template <class T>
struct Pairs {
  using Id = typename ExpConstants<T>::Bits;  // as wide as T: one comparison per vector of scores
  int64_t rows, items, width, ld;
  const T* x;               // [N + a register tile of zeros, ld]
  Rows candidate;           // [C, D]
  const T* bias;            // [C] or null
  const int64_t* positive;  // [N], -1: none
  int64_t columns;          // G
  const Id* row_group;      // [G, N], and [G, C]; a negative id differs between the two
  const Id* item_group;
  // Listed candidates of row i: listed[list_begin[i] ... list_end[i]], sorted. Null: none.
  const int64_t* listed;
  const int64_t* list_begin;
  const int64_t* list_end;
};

template <class T>
constexpr T OUT = -std::numeric_limits<T>::infinity();

// The ids of `count` lanes from `first` on, for mask_groups. [G, BLOCK]
template <class Id>
FASTREC_INLINE void load_lanes(int64_t columns, int64_t first, int64_t count, const Id* ids,
                               int64_t stride, Id* lanes) {
  for (int64_t g = 0; g < columns; ++g) {
    for (int64_t i = 0; i < BLOCK; ++i)
      lanes[g * BLOCK + i] = i < count ? ids[g * stride + first + i] : Id(-3);
  }
}

// Leaves out the pairs of a panel [count, NR] whose ids agree in a column.
template <class S, class T = typename S::T, class Id = typename S::C::Bits>
FASTREC_INLINE void mask_groups(int64_t count, T* s, int64_t columns, const Id* lanes,
                                const Id* streamed, int64_t stride) {
  constexpr int NV = Gemm<S>::NV;
  typedef Id Unaligned __attribute__((vector_size(sizeof(typename S::V)), aligned(sizeof(Id)),
                                      may_alias));
  const typename S::V out = typename S::V{} + OUT<T>;
  for (int64_t g = 0; g < columns; ++g) {
    typename S::I lane[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      lane[j] = *reinterpret_cast<const Unaligned*>(lanes + g * BLOCK + j * S::lanes);
    for (int64_t i = 0; i < count; ++i) {
      Id id = streamed[g * stride + i];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        T* at = s + i * BLOCK + j * S::lanes;
        S::store(at, lane[j] == id ? out : S::load(at));
      }
    }
  }
}

// Leaves out the listed candidates of tile [v, v + count) for rows first .. first + rows; `next` is
// the position of each row in its list and moves on.
template <class T>
FASTREC_INLINE void mask_listed(const Pairs<T>& q, int64_t first, int64_t rows, int64_t v,
                                int64_t count, int64_t* next, T* s) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = next[r], end = q.list_end[first + r];
    for (; at < end && q.listed[at] < v + count; ++at) s[(q.listed[at] - v) * BLOCK + r] = OUT<T>;
    next[r] = at;
  }
}

// The positions of rows first .. first + rows in their lists when a sweep starts at candidate v.
template <class T>
FASTREC_INLINE void start_listed(const Pairs<T>& q, int64_t first, int64_t rows, int64_t v,
                                 int64_t* next) {
  for (int64_t r = 0; r < rows; ++r) {
    next[r] = std::lower_bound(q.listed + q.list_begin[first + r],
                               q.listed + q.list_end[first + r], v) - q.listed;
  }
}

}  // namespace fastrec
