// SPDX-License-Identifier: Apache-2.0
// The gradient of the table of sampled_linear_cross_entropy: sums over the pairs of each item.
#pragma once

#include <cstring>

#include "sampled_linear_cross_entropy.h"

namespace fastrec {

// Sums of coefficient x vector over entries sorted by item. An entry (a row and a place among its
// candidates, the target last) is in the low bits of its key, the item above them.
template <class T>
struct SumArgs {
  int64_t begin, end, width, ld, negatives;  // items of `start` that this call owns
  const uint64_t* key;
  const int64_t* start;  // [U + 1]
  int place_bits, entry_bits;
  const T* x;                             // [N, ld]
  const T *grad_loss, *grad_target;       // [N]
  const T* grad_negatives;                // [N, K]; null: entries of row N + place are shared
  const T *grad_shared, *grad_offset;     // [K, ld], [K]
  int64_t rows;
  bool sparse;
  void *grad_weight, *grad_bias;          // grad_bias may be null
  ScalarType weight_dtype, bias_dtype;
  int64_t weight_size, bias_size, items, distinct;

  int64_t item(int64_t u) const {
    return u < distinct ? static_cast<int64_t>(key[start[u]] >> entry_bits) : items;
  }
};

template <class T>
FASTREC_INLINE void zero_between(const SumArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t row = a.width * a.weight_size;
  std::memset(static_cast<char*>(a.grad_weight) + begin * row, 0, (end - begin) * row);
  if (!a.grad_bias) return;
  std::memset(static_cast<char*>(a.grad_bias) + begin * a.bias_size, 0, (end - begin) * a.bias_size);
}

template <class S, class T = typename S::T>
FASTREC_INLINE void sum_entries(const SumArgs<T>& a) {
  // The rounding error of a sum grows with the length of the chain: an item may be in every row.
  constexpr int64_t LINK = 64;
  const int64_t width = round_up(a.width, S::lanes);
  const uint64_t place_mask = (uint64_t{1} << a.place_bits) - 1;
  const uint64_t entry_mask = (uint64_t{1} << a.entry_bits) - 1;
  const int64_t entries = a.grad_negatives ? a.start[a.distinct] : 0;
  const int64_t bytes = std::min<int64_t>(a.width * sizeof(T), 4096);
  Buffer<T> sums(2 * width);
  T *total = sums, *link = sums + width;
  for (int64_t u = a.begin; u < a.end; ++u) {
    std::fill_n(total, width, T(0));
    double bias = 0;
    for (int64_t at = a.start[u]; at < a.start[u + 1];) {
      T* sum = at == a.start[u] ? total : link;
      if (sum == link) std::fill_n(sum, width, T(0));
      for (int64_t stop = std::min(at + LINK, a.start[u + 1]); at < stop; ++at) {
        if (at + AHEAD < entries) {  // own negatives: rows and coefficients are all over the place
          const uint64_t later = a.key[at + AHEAD] & entry_mask;
          const int64_t row = later >> a.place_bits, place = later & place_mask;
          __builtin_prefetch(a.grad_negatives + row * a.negatives + place);
          const char* next = reinterpret_cast<const char*>(a.x + row * a.ld);
          for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
        }
        const uint64_t entry = a.key[at] & entry_mask;
        const int64_t row = entry >> a.place_bits, place = entry & place_mask;
        const T* source = row < a.rows ? a.x + row * a.ld : a.grad_shared + place * a.ld;
        T c;
        if (row == a.rows) {
          c = T(1);
          bias += a.grad_offset[place];
        } else {
          c = place == a.negatives ? a.grad_target[row] : a.grad_negatives[row * a.negatives + place];
          c *= a.grad_loss[row];
          bias += c;
        }
        add_scaled<S>(width, c, source, sum);
      }
      if (sum == link)
        for (int64_t d = 0; d < width; ++d) total[d] += link[d];
    }
    const int64_t out = a.sparse ? u : a.item(u);
    // Whoever owns an item owns the items after it that do not occur, the first one also those before.
    if (!a.sparse) zero_between(a, out + 1, a.item(u + 1));
    if (!a.sparse && u == 0) zero_between(a, 0, out);
    store_row<T>(total, a.grad_weight, a.weight_dtype, out * a.width, a.width);
    if (a.grad_bias) store_row<double>(&bias, a.grad_bias, a.bias_dtype, out, 1);
  }
}

FASTREC_DEFINE_PER_ISA(sum_sorted, SumArgs, sum_entries)

}  // namespace fastrec
