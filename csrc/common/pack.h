// SPDX-License-Identifier: Apache-2.0
// Operands of the products of linear layers: matrices in panels, padded vectors, and the ranges of
// rows whose sums are added in order.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "small_gemm.h"

namespace fastrec {
namespace {

constexpr int64_t LANES = 16;  // rows are padded to whole vectors of any instruction set
constexpr int64_t BLOCK_ROWS = 96;  // of a product, 8 tiles of 12: its output stays in the caches

// Element (k, n) of a [depth, columns] matrix is source[k * row + n * column].
template <class T>
struct PackArgs {
  const T* source;
  int64_t row, column, depth, columns;
  T* panels;
};

template <class S, class T = typename S::T>
FASTREC_INLINE void pack(const PackArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  for (int64_t first = 0; first < a.columns; first += NR) {
    const int64_t valid = std::min(NR, a.columns - first);
    T* out = a.panels + first * a.depth;
    for (int64_t k = 0; k < a.depth; ++k, out += NR) {
      const T* from = a.source + k * a.row + first * a.column;
      for (int64_t n = 0; n < valid; ++n) out[n] = from[n * a.column];
      for (int64_t n = valid; n < NR; ++n) out[n] = T(0);
    }
  }
}

FASTREC_DEFINE_PER_ISA(pack_panels, PackArgs, pack)

// The panels of a matrix, which is not empty.
template <class T>
Buffer<T> packed(const T* source, int64_t row, int64_t column, int64_t depth, int64_t columns) {
  Buffer<T> panels(depth * round_up(columns, 4 * LANES));
  pack_panels<T>({source, row, column, depth, columns, panels});
  return panels;
}

template <class T>
Buffer<T> padded(const Tensor& vector, int64_t n) {
  Buffer<T> out(round_up(n, 4 * LANES));
  std::fill_n(static_cast<T*>(out), round_up(n, 4 * LANES), T(0));
  std::copy_n(static_cast<const T*>(Vector<T>(vector, n)), n, static_cast<T*>(out));
  return out;
}

// sums [n] (+)= the sum of `count` rows, `stride` apart, which is one link of a chain of additions.
template <class T>
FASTREC_INLINE void add_link(const T* rows, int64_t stride, int64_t count, int64_t n, bool add,
                             T* link, T* sums) {
  std::fill_n(link, n, T(0));
  for (int64_t r = 0; r < count; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) link[i] += rows[r * stride + i];
  }
  for (int64_t i = 0; i < n; ++i) sums[i] = (add ? sums[i] : 0) + link[i];
}

// Rows whose weight gradient is one chain of links: at most 32 ranges, a function of the number of
// rows alone, because it decides the order of additions.
inline int64_t rows_of_a_range(int64_t count) {
  return round_up(std::max<int64_t>(1024, (count + 31) / 32), 384);  // whole links and blocks
}

// out = sum over ranges of partials[r * stride ...], in order.
template <class T>
void add_ranges(const T* partials, int64_t ranges, int64_t stride, int64_t length, T* out) {
  std::fill_n(out, length, T(0));
  for (int64_t r = 0; r < ranges; ++r) {
    for (int64_t i = 0; i < length; ++i) out[i] += partials[r * stride + i];
  }
}

}  // namespace
}  // namespace fastrec
