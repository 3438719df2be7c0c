// SPDX-License-Identifier: Apache-2.0
// The random number contract of fastrec/random.py (version 2) on vectors: Philox4x32 with 7 rounds,
// 16 draws of 8 bits per call, one call for 16 consecutive columns of one row.
//
// A 64-bit lane holds one 32-bit word of one call, with garbage above it: the product of the low
// halves is one instruction that ignores the garbage, its halves are the next words, and only the
// result is cleaned. Two multiplications, two shifts and four xors per round for a vector of calls.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>  // declares the builtins of every instruction set
#endif

namespace fastrec {

// Numbers of the contract, see SITES in fastrec/random.py.
enum class Site : uint32_t {
  attention = 1,
  embedding = 2,
  attention_output = 3,
  ffn_inner = 4,
  ffn_output = 5,
};

// The words of a call that do not change inside one sequence and head. c0 is row << 16 | group.
struct PhiloxKey {
  uint32_t k0, k1, c1, c2, c3;

  // bits: of a draw.
  PhiloxKey(int64_t seed, int64_t step, Site site, int64_t layer, uint32_t bits = 8)
      : k0(uint32_t(seed) ^ uint32_t(site) << 24 ^ bits << 16),
        k1(uint32_t(uint64_t(seed) >> 32)),
        c1(uint32_t(layer) << 8),
        c2(0),
        c3(uint32_t(step)) {}

  // key: of the sequence, view << 32 | sample id.
  FASTREC_INLINE PhiloxKey of(int64_t key, int64_t head = 0) const {
    PhiloxKey words = *this;
    words.c1 |= uint32_t(uint64_t(key) >> 32) << 16 | uint32_t(head);
    words.c2 = uint32_t(key);
    return words;
  }
};

// Vectors of calls for one register width: `order` is the call that each lane makes, so that
// `store` can interleave the words of two lanes with the unpack instructions of 128-bit parts.
template <int BYTES>
struct PhiloxVector;

template <>
struct PhiloxVector<16> {
  typedef uint64_t V __attribute__((vector_size(16)));
  static constexpr int order[] = {0, 1};
  static FASTREC_INLINE V multiply(V a, V b) {  // full products of the low halves of the lanes
#if defined(__x86_64__)
    typedef int I __attribute__((vector_size(16)));
    return (V)__builtin_ia32_pmuludq128((I)a, (I)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
  }
  static FASTREC_INLINE V even(V a, V b) { return __builtin_shuffle(a, b, V{0, 2}); }
  static FASTREC_INLINE V odd(V a, V b) { return __builtin_shuffle(a, b, V{1, 3}); }
};

#if defined(__x86_64__)
template <>
struct PhiloxVector<32> {
  typedef uint64_t V __attribute__((vector_size(32)));
  static constexpr int order[] = {0, 2, 1, 3};
  static FASTREC_INLINE V multiply(V a, V b) {
    typedef int I __attribute__((vector_size(32)));
    return (V)__builtin_ia32_pmuludq256((I)a, (I)b);
  }
  static FASTREC_INLINE V even(V a, V b) { return __builtin_shuffle(a, b, V{0, 4, 2, 6}); }
  static FASTREC_INLINE V odd(V a, V b) { return __builtin_shuffle(a, b, V{1, 5, 3, 7}); }
};

template <>
struct PhiloxVector<64> {
  typedef uint64_t V __attribute__((vector_size(64)));
  static constexpr int order[] = {0, 4, 1, 5, 2, 6, 3, 7};
  static FASTREC_INLINE V multiply(V a, V b) {
    typedef int I __attribute__((vector_size(64)));
    typedef long long L __attribute__((vector_size(64)));
    return (V)__builtin_ia32_pmuludq512_mask((I)a, (I)b, (L)a, (unsigned char)-1);
  }
  static FASTREC_INLINE V even(V a, V b) {
    return __builtin_shuffle(a, b, V{0, 8, 2, 10, 4, 12, 6, 14});
  }
  static FASTREC_INLINE V odd(V a, V b) {
    return __builtin_shuffle(a, b, V{1, 9, 3, 11, 5, 13, 7, 15});
  }
};
#endif

template <int BYTES>
struct Philox {
  using Vector = PhiloxVector<BYTES>;
  using V = typename Vector::V;
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  static constexpr int lanes = BYTES / 8;  // calls per vector
  // `fill` writes whole vectors: room that a buffer needs behind its last byte.
  static constexpr int slack = 2 * BYTES;

  static FASTREC_INLINE V broadcast(uint32_t x) { return V{} + uint64_t{x}; }

  // The 16 bytes of N * lanes calls with the first words c0, in the order of the calls.
  template <int N>
  static FASTREC_INLINE void calls(const PhiloxKey& key, const V (&c0)[N], uint8_t* out) {
    V x0[N], x1[N], x2[N], x3[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      x0[i] = c0[i], x1[i] = broadcast(key.c1), x2[i] = broadcast(key.c2);
      x3[i] = broadcast(key.c3);
    }
    const V m0 = broadcast(0xD2511F53u), m1 = broadcast(0xCD9E8D57u);
    uint32_t k0 = key.k0, k1 = key.k1;
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const V v0 = broadcast(k0), v1 = broadcast(k1);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        V p0 = Vector::multiply(x0[i], m0), p1 = Vector::multiply(x2[i], m1);
        x0[i] = (p1 >> 32) ^ x1[i] ^ v0, x1[i] = p1;
        x2[i] = (p0 >> 32) ^ x3[i] ^ v1, x3[i] = p0;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      V low = (x0[i] & 0xffffffffu) | x1[i] << 32, high = (x2[i] & 0xffffffffu) | x3[i] << 32;
      Unaligned* at = reinterpret_cast<Unaligned*>(out + i * 16 * lanes);
      at[0] = Vector::even(low, high);
      at[1] = Vector::odd(low, high);
    }
  }

  // An element is kept where its draw is at least `drop`: all bits set in that lane of S, else 0.
  // Reads one byte per lane.
  template <class S>
  static FASTREC_INLINE typename S::I keep(const uint8_t* draws, int drop) {
    typedef uint8_t Bytes __attribute__((vector_size(S::lanes), aligned(1), may_alias));
    using Wide = typename S::I;
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(draws), Wide) >= Wide{} + drop;
  }

  // The draws of the 16 * groups columns from 16 * group on, of the rows `first` .. `first + rows -
  // 1`, row after row: out[16 * groups * i + column - 16 * group]. For features of events, rows are
  // consecutive positions of one sequence. Up to `slack` bytes behind the last draw are written too.
  static FASTREC_INLINE void fill(const PhiloxKey& key, int64_t first, int64_t rows, int64_t groups,
                                  uint8_t* out, int64_t group = 0) {
    if (rows <= 0 || groups <= 0) return;
    typedef int32_t I __attribute__((vector_size(BYTES)));
    const uint32_t width = uint32_t(groups), carry = (1u << 16) - width;
    const uint32_t end = uint32_t(group) + width;
    alignas(64) uint64_t start[lanes];
    uint32_t word = uint32_t(first) << 16 | uint32_t(group);
    for (int call = 0; call < lanes; ++call) {
#pragma GCC unroll 8
      for (int i = 0; i < lanes; ++i)
        if (Vector::order[i] == call) start[i] = word;
      if ((++word & 0xffffu) >= end) word += carry;
    }
    V c0 = *reinterpret_cast<const V*>(start);
    // `lanes` calls on: some rows, some groups, and at most one carry from the groups to the rows.
    const V step = broadcast(uint32_t(lanes) / width << 16 | uint32_t(lanes) % width);
    auto next = [&](auto size) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      V words[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        words[i] = c0;
        c0 += step;
        c0 += (V)((I)(c0 & 0xffffu) >= (I)broadcast(end)) & broadcast(carry);
      }
      calls<N>(key, words, out);
      out += N * 16 * lanes;
    };
    int64_t vectors = (rows * groups + lanes - 1) / lanes;
    // A round is a chain of 6 cycles: four vectors hide it.
    for (; vectors >= 4; vectors -= 4) next(std::integral_constant<int, 4>{});
    if (vectors == 3) next(std::integral_constant<int, 3>{});
    if (vectors == 2) next(std::integral_constant<int, 2>{});
    if (vectors == 1) next(std::integral_constant<int, 1>{});
  }
};

}  // namespace fastrec
