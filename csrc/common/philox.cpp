// SPDX-License-Identifier: Apache-2.0
// fastrec::philox_draws: the generator of philox.h by itself, for its tests.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "philox.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"
#include "simd.h"

namespace fastrec {
namespace {

template <class T>
struct DrawArgs {
  PhiloxKey key;
  const int64_t* keys;
  int64_t sequences, head, rows, groups;
  uint8_t *buffer, *out;
};

template <class S>
FASTREC_INLINE void draw_samples(const DrawArgs<typename S::T>& a) {
  const int64_t bytes = a.rows * a.groups * 16;
  for (int64_t i = 0; i < a.sequences; ++i) {
    Philox<sizeof(typename S::V)>::fill(a.key.of(a.keys[i], a.head), 0, a.rows, a.groups, a.buffer);
    std::memcpy(a.out + i * bytes, a.buffer, bytes);
  }
}
FASTREC_DEFINE_PER_ISA(draw, DrawArgs, draw_samples)

// rng [2]: seed and step. uint8 [B, rows, 16 * groups].
Tensor philox_draws(Tensor rng, Tensor keys, int64_t rows, int64_t groups, int64_t site,
                    int64_t layer, int64_t head) {
  Tensor state = torch::stable::contiguous(rng), all = torch::stable::contiguous(keys);
  const int64_t* words = data<int64_t>(state);
  check_size("rng", state, {2}), check_size("keys", all, {all.size(0)});
  STD_TORCH_CHECK(rows >= 0 && groups >= 0, "sizes must not be negative");
  Tensor out = torch::stable::new_empty(all, {all.size(0), rows, 16 * groups},
                                        torch::headeronly::ScalarType::Byte);
  std::vector<uint8_t> buffer(rows * groups * 16 + 128);  // the largest Philox::slack
  draw<float>({PhiloxKey(words[0], words[1], static_cast<Site>(site), layer),
               data<int64_t>(all), all.size(0), head, rows, groups,
               buffer.data(), data<uint8_t>(out)});
  return out;
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_FRAGMENT(fastrec, m) {
  m.def(
      "philox_draws(Tensor rng, Tensor keys, int rows, int groups, int site, int layer, int head)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("philox_draws", TORCH_BOX(&fastrec::philox_draws));
}
