// SPDX-License-Identifier: Apache-2.0
// Attention of one head of one sequence, forward and backward, free of torch types except a dtype.
//
// Legend: L events of the sequence, D head width, S scores and P probabilities of a block of ROWS
// queries with a tile of KEYS keys. Vector lanes are keys in S and P, features in everything else.
// Hence the bytes of the random number contract (16 keys of one query a call) lie in the order of
// the lanes, and only K (and V in the backward pass) is ever transposed.
//
// Tiles of keys are the outer loop: K, V, dK and dV of a tile stay in the L2 while all queries pass.
// Up to KEYS events there is one tile, a softmax of whole rows, and delta = sum_j P dP of the very
// products it is subtracted from; beyond, a running maximum and sum, and delta = dO . O.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "convert.h"
#include "gemm.h"
#include "lse.h"
#include "philox.h"
#include "simd.h"
#include "small_gemm.h"

namespace fastrec {

constexpr int64_t ROWS = 48;   // queries of a block
constexpr int64_t KEYS = 480;  // of a tile: whole blocks, panels and draws, and no power of 2: columns
                               // of S and dP are read at that stride, which then misses few sets

// A [T, H, D] tensor with contiguous features; strides in elements.
struct Heads {
  char* data;
  int64_t event, head;
  ScalarType dtype;

  template <class Element>
  FASTREC_INLINE Element* at(int64_t t, int64_t h) const {
    return reinterpret_cast<Element*>(data) + t * event + h * head;
  }
  FASTREC_INLINE Rows rows(int64_t t, int64_t h) const {
    int64_t size = bytes_of(dtype);
    return {data + (t * event + h * head) * size, event * size, dtype};
  }
};

// Sequences order[first] .. order[last - 1] and heads [first_head, last_head).
struct Task {
  int64_t first, last, first_head, last_head;
};

template <class T>
struct AttentionArgs {
  int64_t heads, width, longest;
  const int64_t* offsets;        // [B + 1]
  const int64_t* sequence_keys;  // [B], null without dropout
  PhiloxKey key;                 // but for the key of the sequence
  int drop;  // an element is dropped where its draw is below; 0: no dropout
  bool causal;
  T scale;
  Heads query, key_, value;
  Heads out;  // in the backward pass only of sequences of several tiles
  Heads grad_out, grad_query, grad_key, grad_value;  // backward only
  T *lse, *left_out;                               // [T, H]: rounded, what rounding left out
  const int64_t* order;
  const Task* tasks;
  int64_t task_count;
  std::atomic<int64_t>* next;
};

// Matrices of a head as the products want them: a pointer and a row stride.
template <class T>
struct Matrix {
  T* data;
  int64_t ld;
};

template <class S>
struct Attention {
  using T = typename S::T;
  using V = typename S::V;
  using I = typename S::I;
  using Random = Philox<sizeof(V)>;
  static constexpr int NR = SmallGemm<S>::NR;
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  const AttentionArgs<T>& a;
  const int64_t width;   // D in whole vectors
  const int64_t events;  // longest sequence in whole panels
  const int64_t keys;    // of a tile in whole panels: row stride of S and dP
  const T keep_scale;    // of what dropout leaves
  // Copies of q, k, v, dO where the tensors cannot be read as they are; results likewise.
  Buffer<T> q_copy, k_copy, v_copy, g_copy, out_copy, dk_copy, dv_copy;
  Buffer<T> k_panels, v_panels, s, dp, normaliser;
  Buffer<T> tops, sums, deltas;  // of each query of a sequence of several tiles
  Buffer<uint8_t> draws;

  FASTREC_INLINE explicit Attention(const AttentionArgs<T>& args, bool backward)
      : a(args),
        width(round_up(args.width, S::lanes)),
        events(round_up(args.longest, NR)),
        keys(std::min(events, KEYS)),
        keep_scale(args.drop ? T(256) / T(256 - args.drop) : T(1)),
        q_copy(events * width),
        k_copy(events * width),
        v_copy(events * width),
        g_copy(backward ? events * width : 0),
        out_copy(events * width),
        dk_copy(backward ? events * width : 0),
        dv_copy(backward ? events * width : 0),
        k_panels(keys * width),
        v_panels(backward ? keys * width : 0),
        s(ROWS * keys),
        dp(backward ? ROWS * keys : 0),
        normaliser(ROWS),
        tops(backward ? 0 : events),
        sums(backward ? 0 : events),
        deltas(backward ? events : 0),
        draws(args.drop ? ROWS * round_up(keys, 16) + Random::slack : 0) {}

  // The tensor itself where its type and whole vectors allow it, else a copy padded with zeros.
  FASTREC_INLINE Matrix<const T> read(const Heads& x, int64_t t, int64_t h, int64_t length,
                                      T* copy) const {
    if (direct(x)) return {x.at<T>(t, h), x.event};
    Rows rows = x.rows(t, h);
    for (int64_t i = 0; i < length; ++i) {
      rows.load(i, copy + i * width, a.width);
      for (int64_t d = a.width; d < width; ++d) copy[i * width + d] = 0;
    }
    return {copy, width};
  }
  FASTREC_INLINE bool direct(const Heads& x) const {
    constexpr ScalarType own = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    return x.dtype == own && a.width == width;
  }
  FASTREC_INLINE Matrix<T> target(const Heads& x, int64_t t, int64_t h, T* copy) const {
    return direct(x) ? Matrix<T>{x.at<T>(t, h), x.event} : Matrix<T>{copy, width};
  }
  FASTREC_INLINE void write(const Heads& x, int64_t t, int64_t h, int64_t length,
                            const T* copy) const {
    if (direct(x)) return;
    for (int64_t i = 0; i < length; ++i)
      store_row<T>(copy + i * width, x.data, x.dtype, (t + i) * x.event + h * x.head, a.width);
  }

  // s[rows, count] = factor * x y^T with y packed.
  FASTREC_INLINE void scores(int64_t rows, int64_t count, Matrix<const T> x, const T* panels,
                             const T& factor, T* out) const {
    product<S>({rows, a.width, count, x.data, x.ld, 1, panels, NR, width * NR, out, keys, &factor,
                0, false});
  }
  // out (+)= factor * x y, x [rows, count] or its transpose.
  FASTREC_INLINE void combine(int64_t rows, int64_t count, const T* x, int64_t row, int64_t step,
                              Matrix<const T> y, Matrix<T> out, const T* factor,
                              int64_t factor_step, bool add) const {
    product<S>({rows, count, a.width, x, row, step, y.data, y.ld, NR, out.data, out.ld, factor,
                factor_step, add});
  }

  static FASTREC_INLINE I lane_index() {
    alignas(64) static constexpr typename S::C::Bits index[] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                                8, 9, 10, 11, 12, 13, 14, 15};
    return *reinterpret_cast<const I*>(index);
  }
  static FASTREC_INLINE V select(I mask, V v) { return (V)(mask & (I)v); }

  // The elements [valid, whole vector) of a row become `fill`; returns the number of vectors.
  static FASTREC_INLINE int64_t end_row(T* row, int64_t valid, T fill) {
    int64_t full = valid / S::lanes * S::lanes;
    if (full == valid) return full / S::lanes;
    V v = S::load(row + full), filled = V{} + fill;
    S::store(row + full, lane_index() < I{} + typename S::C::Bits(valid - full) ? v : filled);
    return full / S::lanes + 1;
  }
  // Calls step(j, N) for vectors j .. j + N - 1 of `count`: several chains of an exp at a time.
  template <class Step>
  static FASTREC_INLINE void by_vectors(int64_t count, const Step& step) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) step(j, std::integral_constant<int, 4>{});
    if (j + 2 <= count) {
      step(j, std::integral_constant<int, 2>{});
      j += 2;
    }
    if (j < count) step(j, std::integral_constant<int, 1>{});
  }

  // Scores of a row -> exp(s - top), 0 where dropped. `top` becomes the greatest of it and of the
  // scores; returns the sum of all.
  FASTREC_INLINE T softmax(T* row, int64_t valid, int64_t count, const uint8_t* draw,
                           T& top) const {
    int64_t vectors = end_row(row, valid, -infinity);
    V peak = S::load(row);
    for (int64_t j = 1; j < vectors; ++j) peak = S::max(peak, S::load(row + j * S::lanes));
    auto greater = [](auto x, auto y) { return x > y ? x : y; };
    top = greater(reduce<S>(peak, greater), top);
    const T shift = finite_shift(top);
    V total{};
    by_vectors(vectors, [&](int64_t j, auto n) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      V p[N];
      T* at = row + j * S::lanes;
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) p[i] = S::load(at + i * S::lanes) - shift;
      S::exp(p);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        total += p[i];
        if (a.drop)
          p[i] = select(Random::template keep<S>(draw + (j + i) * S::lanes, a.drop), p[i]);
        S::store(at + i * S::lanes, p[i]);
      }
    });
    for (int64_t j = vectors * S::lanes; j < count; j += S::lanes) S::store(row + j, V{});
    return reduce<S>(total, [](auto x, auto y) { return x + y; });
  }

  // s -> P = exp(s - lse) with the sign bit where dropped, dp -> dP with 0 there; returns sum_j P dP.
  // With KNOWN delta: s -> P with 0 where dropped, dp -> dS. The rounding of lse can be far above
  // that of s - lse: so both its parts. 0 beyond the valid keys.
  template <bool KNOWN>
  FASTREC_INLINE T probabilities(T* row, T* grad, int64_t valid, int64_t count,
                                 const uint8_t* draw, T lse, T left_out, T delta) const {
    int64_t vectors = end_row(row, valid, -infinity);
    V total_weighted{};
    by_vectors(vectors, [&](int64_t j, auto n) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      V p[N];
      T *at = row + j * S::lanes, *grad_at = grad + j * S::lanes;
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) p[i] = S::load(at + i * S::lanes) - lse - left_out;
      S::exp(p);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        V g = S::load(grad_at + i * S::lanes);
        I keep = ~I{};
        if (a.drop) {
          keep = Random::template keep<S>(draw + (j + i) * S::lanes, a.drop);
          g = select(keep, g);
        }
        if constexpr (KNOWN) {
          g = p[i] * (g - delta);
          if (a.drop) p[i] = select(keep, p[i]);
        } else {
          total_weighted += p[i] * g;
          if (a.drop) p[i] = (V)((I)p[i] | (~keep & (I)-V{}));
        }
        S::store(grad_at + i * S::lanes, g);
        S::store(at + i * S::lanes, p[i]);
      }
    });
    for (int64_t j = vectors * S::lanes; j < count; j += S::lanes) {
      S::store(row + j, V{});
      S::store(grad + j, V{});
    }
    return reduce<S>(total_weighted, [](auto x, auto y) { return x + y; });
  }

  // (P with signs, dP) -> (P with 0 where dropped, dS). A NaN is not below 0 and stays one. (Two
  // comparisons joined by `|` are taken apart lane by lane by gcc for AVX-512.)
  static FASTREC_INLINE void score_gradients(T* row, T* grad, int64_t valid, T delta) {
    const I sign = (I)-V{};
    for (int64_t j = 0; j < valid; j += S::lanes) {
      V p = S::load(row + j), g = S::load(grad + j);
      S::store(row + j, p < V{} ? V{} : p);
      S::store(grad + j, (V)((I)p & ~sign) * (g - delta));
    }
  }

  FASTREC_INLINE PhiloxKey key_of(int64_t b, int64_t h) const {
    return a.drop ? a.key.of(a.sequence_keys[b], h) : a.key;
  }
  // Of the keys from `start` on, `tile` of them: what the queries before `end` see together.
  FASTREC_INLINE int64_t keys_of(int64_t end, int64_t start, int64_t tile) const {
    return a.causal ? std::min(tile, end - start) : tile;
  }
  template <class Element>
  static FASTREC_INLINE Matrix<Element> from(Matrix<Element> x, int64_t row) {
    return {x.data + row * x.ld, x.ld};
  }

  FASTREC_INLINE void forward(int64_t b, int64_t h) const {
    const int64_t t = a.offsets[b], length = a.offsets[b + 1] - t;
    auto q = read(a.query, t, h, length, q_copy), k = read(a.key_, t, h, length, k_copy);
    auto v = read(a.value, t, h, length, v_copy);
    auto out = target(a.out, t, h, out_copy);
    const PhiloxKey key = key_of(b, h);
    for (int64_t start = 0; start < length; start += KEYS) {
      const int64_t tile = std::min(KEYS, length - start);
      pack_transposed<S>(tile, a.width, k.data + start * k.ld, k.ld, k_panels, width * NR);
      for (int64_t first = a.causal ? start : 0; first < length; first += ROWS) {
        const int64_t rows = std::min(ROWS, length - first);
        const int64_t count = keys_of(first + rows, start, tile);
        const int64_t groups = (count + 15) / 16, padded = round_up(count, S::lanes);
        const bool last = start + tile >= (a.causal ? first + rows : length);
        scores(rows, count, from(q, first), k_panels, a.scale, s);
        if (a.drop) Random::fill(key, first, rows, groups, draws, start / 16);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t valid = keys_of(first + i + 1, start, tile);
          const T before = start > 0 ? tops[first + i] : -infinity;
          T top = before;
          T sum = softmax(s + i * keys, valid, padded, draws + i * groups * 16, top);
          T fade = 1;  // of what earlier tiles have summed
          if (start > 0) {
            if (top > before) fade = std::exp(before - top);
            sum += fade * sums[first + i];
          }
          tops[first + i] = top, sums[first + i] = sum;
          normaliser[i] = last ? keep_scale / sum : T(1);
          if (start > 0) scale_row(out.data + (first + i) * out.ld, fade * normaliser[i]);
          const int64_t at = (t + first + i) * a.heads + h;
          if (last) split_lse(top, std::log(double(sum)), a.lse[at], a.left_out[at]);
        }
        combine(rows, count, s, keys, 1, from(v, start), from(out, first), normaliser, 1,
                start > 0);
      }
    }
    write(a.out, t, h, length, out_copy);
  }

  FASTREC_INLINE void scale_row(T* row, T factor) const {
    if (factor == 1) return;
    for (int64_t d = 0; d < width; d += S::lanes) S::store(row + d, S::load(row + d) * factor);
  }

  FASTREC_INLINE void backward(int64_t b, int64_t h) const {
    const int64_t t = a.offsets[b], length = a.offsets[b + 1] - t;
    auto q = read(a.query, t, h, length, q_copy), k = read(a.key_, t, h, length, k_copy);
    auto v = read(a.value, t, h, length, v_copy), g = read(a.grad_out, t, h, length, g_copy);
    if (length > KEYS) dot_rows(length, read(a.out, t, h, length, out_copy), g, deltas);
    auto dq = target(a.grad_query, t, h, out_copy), dk = target(a.grad_key, t, h, dk_copy);
    auto dv = target(a.grad_value, t, h, dv_copy);
    const PhiloxKey key = key_of(b, h);
    for (int64_t start = 0; start < length; start += KEYS) {
      const int64_t tile = std::min(KEYS, length - start), begin = a.causal ? start : 0;
      pack_transposed<S>(tile, a.width, k.data + start * k.ld, k.ld, k_panels, width * NR);
      pack_transposed<S>(tile, a.width, v.data + start * v.ld, v.ld, v_panels, width * NR);
      for (int64_t first = begin; first < length; first += ROWS) {
        const int64_t rows = std::min(ROWS, length - first);
        const int64_t count = keys_of(first + rows, start, tile);
        const int64_t groups = (count + 15) / 16, padded = round_up(count, S::lanes);
        scores(rows, count, from(q, first), k_panels, a.scale, s);
        scores(rows, count, from(g, first), v_panels, keep_scale, dp);
        if (a.drop) Random::fill(key, first, rows, groups, draws, start / 16);
        for (int64_t i = 0; i < rows; ++i) {
          T *p = s + i * keys, *grad = dp + i * keys;
          const int64_t valid = keys_of(first + i + 1, start, tile);
          const int64_t at = (t + first + i) * a.heads + h;
          const uint8_t* draw = draws + i * groups * 16;
          if (length > KEYS) {
            probabilities<true>(p, grad, valid, padded, draw, a.lse[at], a.left_out[at],
                                deltas[first + i]);
          } else {
            T delta = probabilities<false>(p, grad, valid, padded, draw, a.lse[at],
                                           a.left_out[at], 0);
            score_gradients(p, grad, valid, delta);
          }
        }
        // Keys that no earlier block of queries has seen have nothing to add to.
        const int64_t seen = first == begin ? 0 : keys_of(first, start, tile);
        add_transposed(seen, rows, count, s, from(g, first), from(dv, start), keep_scale);
        add_transposed(seen, rows, count, dp, from(q, first), from(dk, start), a.scale);
        combine(rows, count, dp, keys, 1, from(k, start), from(dq, first), &a.scale, 0, start > 0);
      }
    }
    write(a.grad_query, t, h, length, out_copy);
    write(a.grad_key, t, h, length, dk_copy);
    write(a.grad_value, t, h, length, dv_copy);
  }

  // out[i] = x[i] . y[i]
  FASTREC_INLINE void dot_rows(int64_t rows, Matrix<const T> x, Matrix<const T> y, T* out) const {
    for (int64_t i = 0; i < rows; ++i) {
      V sum{};
      for (int64_t d = 0; d < width; d += S::lanes)
        sum += S::load(x.data + i * x.ld + d) * S::load(y.data + i * y.ld + d);
      out[i] = reduce<S>(sum, [](auto x, auto y) { return x + y; });
    }
  }

  // out[j] += factor * sum_i x[i, j] y[i]; rows of out from `seen` on are written, not added to.
  FASTREC_INLINE void add_transposed(int64_t seen, int64_t rows, int64_t count, const T* x,
                                     Matrix<const T> y, Matrix<T> out, const T& factor) const {
    if (seen > 0) combine(seen, rows, x, 1, keys, y, out, &factor, 0, true);
    if (count > seen)
      combine(count - seen, rows, x + seen, 1, keys, y, from(out, seen), &factor, 0, false);
  }
};

template <class S, class T = typename S::T>
FASTREC_INLINE void attention_tasks(const AttentionArgs<T>& a, bool backward) {
  Attention<S> attention(a, backward);
  int64_t at;
  while ((at = a.next->fetch_add(1)) < a.task_count) {
    const Task& task = a.tasks[at];
    for (int64_t i = task.first; i < task.last; ++i) {
      for (int64_t h = task.first_head; h < task.last_head; ++h)
        backward ? attention.backward(a.order[i], h) : attention.forward(a.order[i], h);
    }
  }
}
template <class S>
FASTREC_INLINE void attention_forward_tasks(const AttentionArgs<typename S::T>& a) {
  attention_tasks<S>(a, false);
}
template <class S>
FASTREC_INLINE void attention_backward_tasks(const AttentionArgs<typename S::T>& a) {
  attention_tasks<S>(a, true);
}

FASTREC_DEFINE_PER_ISA(attention_forward, AttentionArgs, attention_forward_tasks)
FASTREC_DEFINE_PER_ISA(attention_backward, AttentionArgs, attention_backward_tasks)

}  // namespace fastrec
