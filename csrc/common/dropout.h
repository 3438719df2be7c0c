// SPDX-License-Identifier: Apache-2.0
// Dropout of whole rows by the contract of fastrec/random.py: a row has the key of its sequence and
// its position there.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "philox.h"

namespace fastrec {

struct Dropout {
  const int64_t *keys, *positions;  // [T]
  PhiloxKey key;                    // but for the key of the row
  int64_t drop;                     // of 256; 0 keeps everything
};

// Draws are made for a run of consecutive positions of one sequence at a time: a row of 64 columns
// is one vector of calls, which alone would wait for its own rounds.
template <class S>
class MaskTile {
 public:
  using T = typename S::T;
  MaskTile(const Dropout& dropout, int64_t width)
      : dropout_(dropout),
        width_(width),
        groups_((width + 15) / 16),
        scale_(T(256) / T(256 - dropout.drop)),
        draws_(dropout.drop ? ROWS * groups_ * 16 + Generator::slack : 0) {}

  // out = mask of row i * in. Rows up to `end` may be drawn ahead; i must not decrease.
  FASTREC_INLINE void apply(int64_t i, int64_t end, const T* in, T* __restrict out) {
    if (i >= end_) draw(i, end);
    const uint8_t* draws = draws_ + (i - begin_) * groups_ * 16;
    typedef uint8_t Bytes __attribute__((vector_size(S::lanes)));
    typedef Bytes Unaligned __attribute__((aligned(1), may_alias));
    using I = typename S::I;
    const typename S::C::Bits drop = dropout_.drop;
    int64_t d = 0;
    for (; d + S::lanes <= width_; d += S::lanes) {
      I draw = __builtin_convertvector(*reinterpret_cast<const Unaligned*>(draws + d), I);
      S::store(out + d, draw >= drop ? S::load(in + d) * scale_ : typename S::V{});
    }
    for (; d < width_; ++d) out[d] = draws[d] >= drop ? in[d] * scale_ : T(0);
  }

 private:
  using Generator = Philox<sizeof(typename S::V)>;
  static constexpr int64_t ROWS = 32;

  FASTREC_INLINE void draw(int64_t i, int64_t end) {
    const int64_t *keys = dropout_.keys, *positions = dropout_.positions;
    begin_ = i;
    end = std::min(end, i + ROWS);
    for (end_ = i + 1; end_ < end; ++end_) {
      if (keys[end_] != keys[i] || positions[end_] != positions[i] + (end_ - i)) break;
    }
    Generator::fill(dropout_.key.of(keys[i]), positions[i], end_ - i, groups_, draws_);
  }

  const Dropout& dropout_;
  int64_t width_, groups_, begin_ = 0, end_ = 0;
  T scale_;
  Buffer<uint8_t> draws_;
};

}  // namespace fastrec
