// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::distinct_rows and fastrec::sum_rows: which rows of a table some ids name, and
// the gradients of equal ones added.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace fastrec {
namespace {

// A bit for every row of the table, and how many are set in front of each word of them. A sort of
// 294,000 ids takes 6 times as long: its branches are those that a processor cannot foresee.
template <class T>
struct DistinctArgs {
  const int64_t* ids;
  int64_t count, words;
  uint64_t* bits;     // [words], zeros
  int64_t* before;    // [words + 1]
  int64_t *rows, *place;  // [distinct], [count]
};

template <class S, class T = typename S::T>
FASTREC_INLINE void mark_body(const DistinctArgs<T>& a) {
  for (int64_t i = 0; i < a.count; ++i)
    if (a.ids[i] >= 0) a.bits[a.ids[i] >> 6] |= uint64_t(1) << (a.ids[i] & 63);
  a.before[0] = 0;
  for (int64_t w = 0; w < a.words; ++w)
    a.before[w + 1] = a.before[w] + __builtin_popcountll(a.bits[w]);
}
FASTREC_DEFINE_PER_ISA(mark, DistinctArgs, mark_body)

template <class S, class T = typename S::T>
FASTREC_INLINE void place_body(const DistinctArgs<T>& a) {
  for (int64_t w = 0; w < a.words; ++w) {
    int64_t* out = a.rows + a.before[w];
    for (uint64_t left = a.bits[w]; left; left &= left - 1)
      *out++ = (w << 6) + __builtin_ctzll(left);
  }
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t id = a.ids[i];
    const uint64_t below = (uint64_t(1) << (id & 63)) - 1;
    a.place[i] = id < 0 ? -1 : a.before[id >> 6] + __builtin_popcountll(a.bits[id >> 6] & below);
  }
}
FASTREC_DEFINE_PER_ISA(place, DistinctArgs, place_body)

std::tuple<Tensor, Tensor> distinct_rows(Tensor ids, int64_t total) {
  Tensor from = torch::stable::contiguous(ids);
  const int64_t *at = int64_data(from), count = ids.numel(), words = (total + 63) / 64;
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(-1 <= at[i] && at[i] < total, "ids must be in [-1, ", total, "), got ", at[i]);
  std::vector<uint64_t> bits(words, 0);
  std::vector<int64_t> before(words + 1);
  DistinctArgs<float> a{at, count, words, bits.data(), before.data(), nullptr, nullptr};
  mark<float>(a);
  Tensor rows = torch::stable::new_empty(from, {before[words]});
  Tensor places = torch::stable::empty_like(from);
  a.rows = data<int64_t>(rows), a.place = data<int64_t>(places);
  place<float>(a);
  return {rows, places};
}

template <class T>
struct SumArgs {
  const int64_t* place;
  const T* grad;
  int64_t entries, width, first, last;  // of the sums
  T scale;
  uint8_t* started;  // [U], zeros
  T* out;            // [U, width]
};

template <class S, class T = typename S::T>
FASTREC_INLINE void sum_body(const SumArgs<T>& a) {
  for (int64_t i = 0; i < a.entries; ++i) {
    const int64_t u = a.place[i];
    if (u < a.first || u >= a.last) continue;
    T* out = a.out + u * a.width;
    const T* from = a.grad + i * a.width;
    if (a.started[u])
      for (int64_t d = 0; d < a.width; ++d) out[d] += a.scale * from[d];
    else
      for (int64_t d = 0; d < a.width; ++d) out[d] = a.scale * from[d];
    a.started[u] = 1;
  }
}
FASTREC_DEFINE_PER_ISA(sum, SumArgs, sum_body)

Tensor sum_rows(Tensor grad, Tensor place, int64_t count, double scale) {
  Tensor from = torch::stable::contiguous(grad), at = torch::stable::contiguous(place);
  const int64_t *where = int64_data(at), entries = place.size(0);
  const int64_t width = grad.dim() == 2 ? grad.size(1) : 1;
  STD_TORCH_CHECK(grad.size(0) == entries, "expected a gradient for each of ", entries, " places, got ",
                  grad.size(0));
  for (int64_t i = 0; i < entries; ++i)
    STD_TORCH_CHECK(-1 <= where[i] && where[i] < count, "places must be in [-1, ", count, "), got ",
                    where[i]);
  std::vector<int64_t> shape{count};
  if (grad.dim() == 2) shape.push_back(width);
  Tensor out = torch::stable::new_empty(from, shape);
  std::vector<uint8_t> started(count, 0);
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    // Every thread looks at all places, which cost an eighth of a row of width 16.
    parallel_for(0, count, 4096, [&](int64_t first, int64_t last) {
      sum<T>(SumArgs<T>{where, data<T>(from), entries, width, first, last, T(scale), started.data(),
                        data<T>(out)});
      for (int64_t u = first; u < last; ++u)
        if (!started[u]) std::fill_n(data<T>(out) + u * width, width, T(0));
    });
  };
  grad.scalar_type() == ScalarType::Double ? typed(0.0) : typed(0.0f);
  return out;
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("distinct_rows", TORCH_BOX(&fastrec::distinct_rows));
  m.impl("sum_rows", TORCH_BOX(&fastrec::sum_rows));
}
