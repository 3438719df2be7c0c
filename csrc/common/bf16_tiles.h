// SPDX-License-Identifier: Apache-2.0
// The products of linear_cross_entropy_bf16.h by the tiles of AMX_BF16: a register holds 16 rows of
// 16 pairs or of 16 sums, and an instruction adds 16 pairs to each of 16 x 16 sums, 512
// multiply-adds a cycle.
//
// Legend: D width, S stationary rows. The instructions are written as text: the intrinsics of gcc 12
// do not say that they read and write memory.
#pragma once

#include "bf16.h"

#ifdef FASTREC_BF16
namespace fastrec {
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace bf16 {

// While it lives, this thread has eight tiles of 16 rows of 64 bytes. Who had others before, such as
// PyTorch's library of products, has those again.
class WithTiles {
 public:
  WithTiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Shapes own{};
    own.palette = 1;
    for (int i = 0; i < 8; ++i) own.bytes[i] = 64, own.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(own));
  }
  ~WithTiles() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      asm volatile("tilerelease");
  }
  WithTiles(const WithTiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Shapes before_;
};

#define FASTREC_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : : : "memory")
#define FASTREC_TILE_LOAD(tile, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(bytes) : "memory")
#define FASTREC_TILE_STORE(tile, to, bytes) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(bytes) : "memory")
#define FASTREC_TILE_MULTIPLY(sums, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sums : : : "memory")

// c = a . b, or c += a . b: 32 rows of a, 32 columns of b, `depth` pairs, a multiple of 16.
template <bool ADD>
FASTREC_INLINE void multiply_tiles(int64_t depth, const Pair* a, int64_t a_ld, const Pair* b,
                                   int64_t b_ld, float* c, int64_t c_ld) {
  const int64_t a_bytes = 4 * a_ld, b_bytes = 4 * b_ld, c_bytes = 4 * c_ld;
  float* below = c + LANES * c_ld;
  if (ADD) {
    FASTREC_TILE_LOAD(0, c, c_bytes);
    FASTREC_TILE_LOAD(1, c + LANES, c_bytes);
    FASTREC_TILE_LOAD(2, below, c_bytes);
    FASTREC_TILE_LOAD(3, below + LANES, c_bytes);
  } else {
    FASTREC_TILE_ZERO(0);
    FASTREC_TILE_ZERO(1);
    FASTREC_TILE_ZERO(2);
    FASTREC_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < depth; k += LANES) {
    FASTREC_TILE_LOAD(4, a + k, a_bytes);
    FASTREC_TILE_LOAD(6, b + k * b_ld, b_bytes);
    FASTREC_TILE_LOAD(7, b + k * b_ld + LANES, b_bytes);
    FASTREC_TILE_MULTIPLY(0, 4, 6);
    FASTREC_TILE_MULTIPLY(1, 4, 7);
    FASTREC_TILE_LOAD(5, a + LANES * a_ld + k, a_bytes);
    FASTREC_TILE_MULTIPLY(2, 5, 6);
    FASTREC_TILE_MULTIPLY(3, 5, 7);
  }
  FASTREC_TILE_STORE(0, c, c_bytes);
  FASTREC_TILE_STORE(1, c + LANES, c_bytes);
  FASTREC_TILE_STORE(2, below, c_bytes);
  FASTREC_TILE_STORE(3, below + LANES, c_bytes);
}

// [16, in_ld] -> its transpose [16, out_ld], words of 32 bits.
FASTREC_INLINE void transpose(const void* in, int64_t in_ld, void* out, int64_t out_ld) {
  __m512i r[LANES], t[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    r[i] = _mm512_loadu_si512(static_cast<const uint32_t*>(in) + i * in_ld);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Quarter l of r[4 g + c]: column 4 l + c of the rows 4 g .. 4 g + 3.
  auto store = [&](int row, __m512i v) __attribute__((always_inline)) {
    _mm512_storeu_si512(static_cast<uint32_t*>(out) + row * out_ld, v);
  };
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    __m512i even_low = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    __m512i odd_low = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    store(c, _mm512_shuffle_i32x4(even, even_low, 0x88));
    store(4 + c, _mm512_shuffle_i32x4(odd, odd_low, 0x88));
    store(8 + c, _mm512_shuffle_i32x4(even, even_low, 0xdd));
    store(12 + c, _mm512_shuffle_i32x4(odd, odd_low, 0xdd));
  }
}

// Members as of `Dot`. The second product is made turned, [D, S]: its left operand is the streamed
// rows, turned once a tile, and its right one the probabilities as they are packed. Otherwise these
// would have to be turned, and there are more of them.
struct Tiles {
  using Scope = WithTiles;
  static constexpr int64_t STEP = 2 * LANES;  // rows and columns of a product
  static_assert(BLOCK % STEP == 0 && TILE % STEP == 0, "whole tiles");

  static FASTREC_INLINE int64_t depth(int64_t width) { return round_up(pairs_of(width), LANES); }

  class Streamed {
   public:
    Streamed(int64_t rows, int64_t width)
        : width(width), ld(row_stride(width)), column_ld(column_stride(width)),
          deep(round_up(width, STEP)), rows((rows + STEP) * ld, 0),
          columns(TILE / 2 * column_ld, 0), turned((rows + TILE - 1) / TILE * deep * TURNED_LD) {}
    FASTREC_INLINE void load(const Rows& source, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) load_row(source, first + i, width, rows + i * ld);
      if (count % 2) std::fill_n(rows + count * ld, ld, 0);
      for (int64_t i = 0; i < count; i += TILE) turn(i, pairs_of(std::min(TILE, count - i)));
    }
    const Pair* row(int64_t i) const { return rows + i * ld; }
    // Of the first row of a tile.
    const Pair* second(int64_t i) const { return turned + i / TILE * deep * TURNED_LD; }
    int64_t row_ld() const { return ld; }

   private:
    static constexpr int64_t TURNED_LD = TILE / 2 + LANES;
    friend struct Tiles;

    FASTREC_INLINE void turn(int64_t first, int64_t pairs) {
      for (int64_t k = 0; k < pairs; ++k)
        interleave(row(first + 2 * k), row(first + 2 * k + 1), width, columns + k * column_ld);
      int64_t whole = round_up(pairs, LANES);  // what is old there is multiplied by zeros of p
      Pair* out = turned + first / TILE * deep * TURNED_LD;
      for (int64_t k = 0; k < whole; k += LANES)
        for (int64_t d = 0; d < deep; d += LANES)
          transpose(columns + k * column_ld + d, column_ld, out + d * TURNED_LD + k, TURNED_LD);
    }

    int64_t width, ld, column_ld, deep;
    Buffer<Pair> rows;     // [rows + a step, ld]: pairs along D
    Buffer<Pair> columns;  // [TILE / 2, column_ld]: of a tile, pairs with the next row
    Buffer<Pair> turned;   // [tiles, D in steps, TURNED_LD]: that, transposed
  };

  // out [rows, NR] = streamed [rows] . panel [depth, NR]; rows in whole steps
  static FASTREC_INLINE void scores(int64_t rows, int64_t depth, const Pair* streamed, int64_t ld,
                                    const Pair* panel, float* out) {
    for (int64_t i = 0; i < rows; i += STEP)
      multiply_tiles<false>(depth, streamed + i * ld, ld, panel, NR, out + i * NR, NR);
  }

  // Sums [S, D] of products of p and streamed rows.
  class Sums {
   public:
    explicit Sums(int64_t width)
        : width(width), deep(round_up(width, STEP)), turned(deep * BLOCK),
          rows(BLOCK * (deep + LANES)) {}
    FASTREC_INLINE void clear() { std::fill_n(static_cast<float*>(turned), deep * BLOCK, 0.0f); }
    FASTREC_INLINE void scale(const float* factor) {
      for (int64_t d = 0; d < width; ++d) {
        float* at = turned + d * BLOCK;
        for (int64_t s = 0; s < BLOCK; ++s) at[s] *= factor[s];
      }
    }
    FASTREC_INLINE void add(int64_t s, int64_t d, float value) { turned[d * BLOCK + s] += value; }
    FASTREC_INLINE void accumulate(int64_t stationary, int64_t depth, Pair* p, const Pair* second) {
      int64_t whole = round_up(depth, LANES);
      for (int64_t k = depth; k < whole; ++k) std::fill_n(p + k * BLOCK, BLOCK, 0);
      for (int64_t d = 0; d < deep; d += STEP)
        for (int64_t s = 0; s < stationary; s += STEP)
          multiply_tiles<true>(whole, second + d * Streamed::TURNED_LD, Streamed::TURNED_LD, p + s,
                               BLOCK, turned + d * BLOCK + s, BLOCK);
    }
    FASTREC_INLINE void finish() {
      for (int64_t d = 0; d < deep; d += LANES)
        for (int64_t s = 0; s < BLOCK; s += LANES)
          transpose(turned + d * BLOCK + s, BLOCK, rows + s * (deep + LANES) + d, deep + LANES);
    }
    const float* row(int64_t s) const { return rows + s * (deep + LANES); }

   private:
    int64_t width, deep;
    Buffer<float> turned;  // [D in steps, BLOCK]
    Buffer<float> rows;    // [BLOCK, D in steps + a vector]: after `finish`
  };
};

}  // namespace bf16
#pragma GCC pop_options
}  // namespace fastrec
#endif
