// SPDX-License-Identifier: Apache-2.0
// CPU kernel of fastrec::draw_negatives: items by an alias table, from two words of the random number
// contract each (fastrec/data/negatives.py, which is its oracle).
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "philox.h"

namespace fastrec {
namespace {

template <class T>
struct DrawArgs {
  PhiloxKey key;
  const int64_t *keys, *positions;     // [N]
  int64_t first, last, number, items;  // rows [first, last), K, V
  const int64_t *threshold, *alias;    // [V] or null
  int64_t* out;                        // [N, K]
};

template <class S, class T = typename S::T>
FASTREC_INLINE void draw_body(const DrawArgs<T>& a) {
  using Random = Philox<sizeof(typename S::V)>;
  const int64_t groups = (a.number + 1) / 2;  // of four words
  Buffer<uint8_t> bytes(groups * 16 + Random::slack);
  const auto* words = reinterpret_cast<const uint32_t*>(static_cast<uint8_t*>(bytes));
  for (int64_t i = a.first; i < a.last; ++i) {
    Random::fill(a.key.of(a.keys[i]), a.positions[i], 1, groups, bytes);
    int64_t* out = a.out + i * a.number;
    for (int64_t k = 0; k < a.number; ++k)
      out[k] = int64_t(uint64_t(words[2 * k]) * uint64_t(a.items) >> 32);
    if (!a.threshold) continue;
    // The slots of a row are known before any is read: their reads do not wait for each other.
    for (int64_t k = 0; k < a.number; ++k) {
      __builtin_prefetch(a.threshold + out[k]);
      __builtin_prefetch(a.alias + out[k]);
    }
    for (int64_t k = 0; k < a.number; ++k)
      out[k] = words[2 * k + 1] < a.threshold[out[k]] ? out[k] : a.alias[out[k]];
  }
}
FASTREC_DEFINE_PER_ISA(draw, DrawArgs, draw_body)

Tensor draw_negatives(Tensor rng, Tensor keys, Tensor positions, int64_t number, int64_t site,
                      int64_t items, std::optional<Tensor> threshold, std::optional<Tensor> alias) {
  Tensor state = torch::stable::contiguous(rng);
  Tensor ids = torch::stable::contiguous(keys), places = torch::stable::contiguous(positions);
  std::optional<Tensor> limits = contiguous_or_none(threshold), others = contiguous_or_none(alias);
  const int64_t rows = keys.size(0), *words = int64_data(state);
  check_size("rng", state, {2}), check_size("positions", places, {rows});
  check_size("threshold", limits, {items}), check_size("alias", others, {items});
  STD_TORCH_CHECK(number >= 0 && items >= 0, "numbers must not be negative");
  Tensor out = torch::stable::new_empty(ids, {rows, number});
  if (number == 0) return out;
  DrawArgs<float> a{PhiloxKey(words[0], words[1], static_cast<Site>(site), 0, 16),
                    int64_data(ids), int64_data(places), 0, 0, number, items,
                    int64_data(limits), int64_data(others), data<int64_t>(out)};
  // Some 20 ns a draw from a table that no cache holds: a task is 16,384 of them.
  parallel_for(0, rows, (16384 + number - 1) / number, [&](int64_t first, int64_t last) {
    DrawArgs<float> part = a;
    part.first = first, part.last = last;
    draw<float>(part);
  });
  return out;
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("draw_negatives", TORCH_BOX(&fastrec::draw_negatives));
}
