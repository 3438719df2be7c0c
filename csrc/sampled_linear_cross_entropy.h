// The arithmetic of sampled_linear_cross_entropy, free of torch types except the dtype of a row.
//
// Legend: N rows, K negatives, D width, ld = padded<T>(D). Negatives of every row: a row streams its
// K rows of the table once, LINE at a time; those of a line are in the L1 when they are added to the
// gradient of the row. Shared negatives: tiles of a matrix product, as in linear_cross_entropy.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "layer_norm.h"
#include "linear_cross_entropy.h"
#include "small_gemm.h"

namespace fastrec {

constexpr int64_t LINE = 64;   // negatives of a row that are scored before they are used
constexpr int64_t AHEAD = 32;  // negatives whose rows are prefetched

// A negative that is the target of a row.
struct Hit {
  int64_t item, place;
  bool operator<(const Hit& other) const {
    return item != other.item ? item < other.item : place < other.place;
  }
};

template <class T>
struct SampledArgs {
  int64_t rows, negatives, width, ld;
  T beta;                  // negative: softmax
  const T* x;              // [N + a register tile of zeros, ld]
  const int64_t* target;   // [N], -1: not scored
  const int64_t* drawn;    // [N, K] or [K]
  Rows weight;             // [V, D]
  const T *bias, *log_q;   // [V] or null
  // Shared negatives only: their rows [K + a register tile, ld], offsets [K] and sorted ids.
  const T *shared, *shared_offset;
  const Hit* sorted;       // [K]
  int64_t begin, end;      // rows, or blocks of rows (forward) or negatives (backward)
  T *loss, *grad_input, *grad_target, *grad_negatives, *lse;  // grad_input may be null
  const T* grad_loss;      // backward of shared negatives, with lse = inf where a row is not scored
  T *grad_shared, *grad_offset;

  T offset(int64_t item) const {
    return (bias ? bias[item] : T(0)) - (log_q ? log_q[item] : T(0));
  }
};

template <class S, class T = typename S::T>
FASTREC_INLINE void add_scaled(int64_t width, T scale, const T* row, T* out) {
  for (int64_t d = 0; d < width; d += S::lanes)
    S::store(out + d, S::load(out + d) + scale * S::load(row + d));
}

// s[j] = x . row_j. Whole vectors: width is a multiple of the lanes, and so is the room in s.
template <class S, class T = typename S::T>
FASTREC_INLINE void row_scores(int64_t count, int64_t width, const T* x, const T* const* row,
                               T* s) {
  using V = typename S::V;
  constexpr int L = S::lanes;
  for (int64_t j = 0; j < count; j += L) {
    V part[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const T* w = row[std::min(j + l, count - 1)];
      V sum = {};
      for (int64_t d = 0; d < width; d += L) sum += S::load(x + d) * S::load(w + d);
      part[l] = sum;
    }
    transpose<S>(part);
#pragma GCC unroll 4
    for (int step = L / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int l = 0; l < step; ++l) part[l] += part[l + step];
    }
    S::store(s + j, part[0]);
  }
}

// out += sum_j p[j] row_j
template <int N, class S, class T = typename S::T>
FASTREC_INLINE void add_rows_tile(int64_t count, const T* p, const T* const* row, int64_t d,
                                  T* out) {
  typename S::V sum[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sum[n] = S::load(out + d + n * S::lanes);
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] += p[j] * S::load(row[j] + d + n * S::lanes);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) S::store(out + d + n * S::lanes, sum[n]);
}
template <class S, class T = typename S::T>
FASTREC_INLINE void add_rows(int64_t count, int64_t width, const T* p, const T* const* row,
                             T* out) {
  int64_t d = 0;
  for (; d + 4 * S::lanes <= width; d += 4 * S::lanes) add_rows_tile<4, S>(count, p, row, d, out);
  for (; d < width; d += S::lanes) add_rows_tile<1, S>(count, p, row, d, out);
}

// exp(v) for v <= 0, of every element.
template <class S>
FASTREC_INLINE typename S::V exp_of(typename S::V v) {
  typename S::V one[1] = {v};
  S::exp(one);
  return one[0];
}

// s -> scale * sigmoid(s), vector by vector; -inf gives 0. Returns exp(-|s|).
template <class S, class V = typename S::V>
FASTREC_INLINE V sigmoid(V& s, typename S::T scale) {
  V e = exp_of<S>(s < V{} ? s : -s);
  V one = V{} + typename S::T(1);
  s = scale * ((s < V{} ? e : one) / (one + e));
  return e;
}

// A product of factors 1 + e in (1, 2], whose logarithm is the sum of log1p(e): one logarithm for
// LINE of them. In double the sum 1 + e loses nothing that a float shows.
template <class S, class T = typename S::T>
FASTREC_INLINE double line_of_losses(int64_t count, T* s, T scale) {
  using V = typename S::V;
  double product = 1, above = 0;
  for (int64_t j = 0; j < count; j += S::lanes) {
    V v = S::load(s + j), positive = v > V{} ? v : V{};
    V e = sigmoid<S>(v, scale);
    S::store(s + j, v);
    for (int l = 0; l < S::lanes && j + l < count; ++l) {
      product *= 1.0 + e[l];
      above += positive[l];
    }
  }
  return above + std::log(product);
}

// What a row knows of its negatives: softmax: the maximum and the sum of exp(s - maximum); binary:
// sum is the sum of softplus(s).
struct Seen {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
};

// Loss, c_iy, and the factor of the terms exp(s - top) that make them the c_ij.
template <class T>
FASTREC_INLINE void finish_softmax(const Seen& seen, double target, T& loss, T& grad_target, T& lse,
                                   T& scale) {
  double top = seen.top, sum = seen.sum;
  if (sum == 0) {
    loss = grad_target = scale = T(0), lse = static_cast<T>(target);
  } else if (target >= top) {
    double e = std::exp(top - target), others = sum * e;
    loss = static_cast<T>(std::log1p(others)), lse = static_cast<T>(target + std::log1p(others));
    grad_target = static_cast<T>(-others / (1 + others)), scale = static_cast<T>(e / (1 + others));
  } else {
    double total = sum + std::exp(target - top);
    loss = static_cast<T>(std::log(total) + (top - target));
    lse = static_cast<T>(std::log(total) + top);
    grad_target = static_cast<T>(-sum / total), scale = static_cast<T>(1 / total);
  }
}
template <class T>
FASTREC_INLINE void finish_binary(const SampledArgs<T>& a, double sum, double target, T& loss,
                                  T& grad_target) {
  double e = std::exp(-std::abs(target)), count = static_cast<double>(a.negatives + 1);
  double softplus = (target < 0 ? -target : 0) + std::log1p(e);
  loss = static_cast<T>((a.beta * softplus + sum) / count);
  grad_target = static_cast<T>(-a.beta * (target < 0 ? 1 : e) / (1 + e) / count);
}

// Rows [begin, end), each with its own negatives.
template <class S, class T = typename S::T>
FASTREC_INLINE void own_forward_rows(const SampledArgs<T>& a) {
  using V = typename S::V;
  const int64_t width = round_up(a.width, S::lanes), K = a.negatives;
  const bool direct = a.weight.dtype == compute_dtype<T>() && a.width == width;
  const bool softmax = a.beta < 0;
  const int64_t bytes = a.weight.stride < 0 ? 0 : std::min<int64_t>(a.weight.stride, 4096);
  const T share = T(1) / static_cast<T>(K + 1);
  Buffer<T> rows((LINE + 1) * a.ld), gradient(a.ld);
  T *tile = rows, *sum = gradient;
  std::fill_n(tile, (LINE + 1) * a.ld, T(0));
  const T* row[LINE];
  alignas(64) T s[LINE], p[LINE];
  auto fetch = [&](int64_t item, int64_t slot) __attribute__((always_inline)) {
    if (direct) return reinterpret_cast<const T*>(a.weight.data + item * a.weight.stride);
    a.weight.load(item, tile + slot * a.ld, a.width);
    return static_cast<const T*>(tile + slot * a.ld);
  };
  for (int64_t i = a.begin; i < a.end; ++i) {
    const int64_t y = a.target[i], *drawn = a.drawn + i * K;
    T* kept = a.grad_negatives ? a.grad_negatives + i * K : nullptr;
    if (y < 0) {
      a.loss[i] = a.grad_target[i] = a.lse[i] = T(0);
      if (kept) std::fill_n(kept, K, T(0));
      if (a.grad_input) std::fill_n(a.grad_input + i * a.width, a.width, T(0));
      continue;
    }
    const T* x = a.x + i * a.ld;
    const T* target_row = fetch(y, LINE);
    row_scores<S>(1, width, x, &target_row, s);
    const double target = s[0] + a.offset(y);
    std::fill_n(sum, width, T(0));
    Seen seen;
    for (int64_t first = 0; first < K; first += LINE) {
      const int64_t count = std::min(LINE, K - first);
      // The ids of the next row follow those of this one.
      const int64_t last = (a.end - i) * K;
      for (int64_t j = 0; j < count; ++j) {
        if (first + j + AHEAD < last) {
          const char* next = a.weight.data + drawn[first + j + AHEAD] * a.weight.stride;
          for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
        }
        row[j] = fetch(drawn[first + j], j);
        if (j % S::lanes == S::lanes - 1 || j == count - 1) {
          const int64_t from = j / S::lanes * S::lanes;
          row_scores<S>(j + 1 - from, width, x, row + from, s + from);
        }
      }
      for (int64_t j = 0; j < round_up(count, S::lanes); ++j) {
        const bool out = j >= count || drawn[first + j] == y;
        s[j] = out ? -std::numeric_limits<T>::infinity() : s[j] + a.offset(drawn[first + j]);
      }
      if (softmax) {
        if (kept) std::copy_n(s, count, kept + first);
        T top = static_cast<T>(seen.top);
        for (int64_t j = 0; j < count; ++j) top = std::max(top, s[j]);
        if (top > seen.top) {
          const T fade = static_cast<T>(std::exp(seen.top - top));
          seen.top = top, seen.sum *= fade;
          for (int64_t d = 0; d < width; ++d) sum[d] *= fade;
        }
        const V shift = V{} + finite_shift(top);
        V total = {};
        for (int64_t j = 0; j < count; j += S::lanes) {
          V e = exp_of<S>(S::load(s + j) - shift);
          S::store(p + j, e);
          total += e;
        }
        for (int l = 0; l < S::lanes; ++l) seen.sum += total[l];
      } else {
        seen.sum += line_of_losses<S>(count, s, share);
        std::copy_n(s, count, p);
        if (kept) std::copy_n(s, count, kept + first);
      }
      if (a.grad_input) add_rows<S>(count, width, p, row, sum);
    }
    T scale = T(1);
    if (softmax)
      finish_softmax(seen, target, a.loss[i], a.grad_target[i], a.lse[i], scale);
    else
      finish_binary(a, seen.sum, target, a.loss[i], a.grad_target[i]), a.lse[i] = T(0);
    if (a.grad_input) {
      for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
      add_scaled<S>(width, a.grad_target[i], target_row, sum);
      std::copy_n(sum, a.width, a.grad_input + i * a.width);
    }
    if (!softmax || !kept) continue;
    const V lse = V{} + a.lse[i];
    for (int64_t j = 0; j < K; j += S::lanes) {
      const int64_t n = std::min<int64_t>(S::lanes, K - j);
      if (n == S::lanes) {
        S::store(kept + j, exp_of<S>(S::load(kept + j) - lse));
        continue;
      }
      std::copy_n(kept + j, n, s);
      S::store(s, exp_of<S>(S::load(s) - lse));
      std::copy_n(s, n, kept + j);
    }
  }
}

// The hits of item y among shared negatives [first, first + count): at(place).
template <class T, class At>
FASTREC_INLINE void for_hits(const SampledArgs<T>& a, int64_t y, int64_t first, int64_t count,
                             const At& at) {
  const Hit* end = a.sorted + a.negatives;
  for (const Hit* hit = std::lower_bound(a.sorted, end, Hit{y, first});
       hit < end && hit->item == y && hit->place < first + count; ++hit)
    at(hit->place - first);
}

// softplus and sigmoid of a panel [count, NR]; lanes are rows, whose losses are added up.
template <class S, class T = typename S::T>
FASTREC_INLINE void binary_panel(int64_t count, T* s, const T* offset, T scale, double* loss) {
  using V = typename S::V;
  alignas(64) T e[S::lanes], positive[S::lanes];
  for (int j = 0; j < Gemm<S>::NV; ++j) {
    for (int64_t first = 0; first < count; first += LINE) {
      double product[S::lanes], above[S::lanes];
      std::fill_n(product, S::lanes, 1.0);
      std::fill_n(above, S::lanes, 0.0);
      for (int64_t i = first; i < std::min(count, first + LINE); ++i) {
        T* at = s + i * BLOCK + j * S::lanes;
        V v = S::load(at) + offset[i];
        S::store(positive, v > V{} ? v : V{});
        S::store(e, sigmoid<S>(v, scale));
        S::store(at, v);
        for (int l = 0; l < S::lanes; ++l) product[l] *= 1.0 + e[l], above[l] += positive[l];
      }
      for (int l = 0; l < S::lanes; ++l)
        loss[j * S::lanes + l] += above[l] + std::log(product[l]);
    }
  }
}

// Blocks [begin, end) of BLOCK rows, shared negatives.
template <class S, class T = typename S::T>
FASTREC_INLINE void shared_forward_blocks(const SampledArgs<T>& a) {
  using G = Gemm<S>;
  const int64_t width = round_up(a.width, S::lanes);
  const T minus_inf = -std::numeric_limits<T>::infinity();
  Buffer<T> packed(a.width * BLOCK), scores(TILE * BLOCK), acc(BLOCK * a.ld), row(a.ld);
  T *s = scores, *target_row = row;
  T top[BLOCK], before[BLOCK], column_sum[BLOCK];
  alignas(64) T score[S::lanes];
  double sum[BLOCK];
  for (int64_t first = a.begin * BLOCK; first < std::min(a.end * BLOCK, a.rows); first += BLOCK) {
    const int64_t rows = std::min(BLOCK, a.rows - first);
    G::pack_transposed(rows, a.width, a.x + first * a.ld, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(target_row, a.ld, T(0));
    std::fill_n(top, BLOCK, minus_inf);
    std::fill_n(sum, BLOCK, 0.0);
    for (int64_t v = 0; v < a.negatives; v += TILE) {
      const int64_t count = std::min(TILE, a.negatives - v);
      const T* tile = a.shared + v * a.ld;
      std::copy_n(top, BLOCK, before);
      for (int64_t n = 0; n < rows; n += G::NR) {
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
        for (int64_t r = n; r < std::min(rows, n + G::NR); ++r)
          for_hits(a, a.target[first + r], v, count, [&](int64_t at) __attribute__((always_inline)) {
            s[at * BLOCK + r] = minus_inf;
          });
        if (a.beta < 0)
          online_softmax<S>(count, s + n, a.shared_offset + v, top + n, column_sum + n);
        else
          binary_panel<S>(count, s + n, a.shared_offset + v,
                          T(1) / static_cast<T>(a.negatives + 1), sum + n);
      }
      for (int64_t r = 0; r < rows && a.beta < 0; ++r) {
        if (top[r] > before[r]) {
          T fade = std::exp(before[r] - top[r]);
          sum[r] *= fade;
          for (int64_t d = 0; d < a.width; ++d) acc[r * a.ld + d] *= fade;
        }
        sum[r] += column_sum[r];
      }
      if (a.grad_input) G::accumulate(rows, count, a.width, s, tile, a.ld, acc, a.ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = first + r, y = a.target[i];
      T* out = a.grad_input ? a.grad_input + i * a.width : nullptr;
      if (y < 0) {
        a.loss[i] = a.grad_target[i] = a.lse[i] = T(0);
        if (out) std::fill_n(out, a.width, T(0));
        continue;
      }
      a.weight.load(y, target_row, a.width);
      const T* only = target_row;
      row_scores<S>(1, width, a.x + i * a.ld, &only, score);
      const double target = score[0] + a.offset(y);
      T scale = T(1);
      if (a.beta < 0)
        finish_softmax({top[r], sum[r]}, target, a.loss[i], a.grad_target[i], a.lse[i], scale);
      else
        finish_binary(a, sum[r], target, a.loss[i], a.grad_target[i]), a.lse[i] = T(0);
      for (int64_t d = 0; out && d < a.width; ++d)
        out[d] = acc[r * a.ld + d] * scale + a.grad_target[i] * target_row[d];
    }
  }
}

// Blocks [begin, end) of BLOCK shared negatives: their rows of the gradient.
template <class S, class T = typename S::T>
FASTREC_INLINE void shared_backward_blocks(const SampledArgs<T>& a) {
  using G = Gemm<S>;
  using V = typename S::V;
  const T minus_inf = -std::numeric_limits<T>::infinity();
  const T share = T(1) / static_cast<T>(a.negatives + 1);
  Buffer<T> packed(a.width * BLOCK), scores(TILE * BLOCK), acc(BLOCK * a.ld);
  T* s = scores;
  T offset[BLOCK], column_sum[BLOCK];
  double sum[BLOCK];
  for (int64_t first = a.begin * BLOCK; first < std::min(a.end * BLOCK, a.negatives);
       first += BLOCK) {
    const int64_t items = std::min(BLOCK, a.negatives - first);
    G::pack_transposed(items, a.width, a.shared + first * a.ld, a.ld, packed);
    std::fill_n(static_cast<T*>(acc), BLOCK * a.ld, T(0));
    std::fill_n(offset, BLOCK, T(0));
    std::fill_n(sum, BLOCK, 0.0);
    std::copy_n(a.shared_offset + first, items, offset);
    for (int64_t row = 0; row < a.rows; row += TILE) {
      const int64_t count = std::min(TILE, a.rows - row);
      const T* tile = a.x + row * a.ld;
      for (int64_t n = 0; n < items; n += G::NR)
        G::scores(count, a.width, tile, a.ld, packed + n * a.width, s + n);
      for (int64_t i = 0; i < count; ++i)
        for_hits(a, a.target[row + i], first, items,
                 [&](int64_t at) __attribute__((always_inline)) { s[i * BLOCK + at] = minus_inf; });
      for (int64_t n = 0; n < items; n += G::NR) {
        if (a.beta < 0) {
          exponentials<S>(
              count, s + n, column_sum + n,
              [&](int64_t i, int j, V v) __attribute__((always_inline)) {
                return v + S::load(offset + n + j * S::lanes) - a.lse[row + i];
              },
              [&](int64_t i, V p) __attribute__((always_inline)) {
                return p * a.grad_loss[row + i];
              });
          continue;
        }
        for (int j = 0; j < G::NV; ++j) {
          V total = {};
          for (int64_t i = 0; i < count; ++i) {
            T* at = s + i * BLOCK + n + j * S::lanes;
            V v = S::load(at) + S::load(offset + n + j * S::lanes);
            sigmoid<S>(v, share * a.grad_loss[row + i]);
            S::store(at, v);
            total += v;
          }
          S::store(column_sum + n + j * S::lanes, total);
        }
      }
      for (int64_t i = 0; i < items; ++i) sum[i] += column_sum[i];
      G::accumulate(items, count, a.width, s, tile, a.ld, acc, a.ld);
    }
    for (int64_t i = 0; i < items; ++i) {
      std::copy_n(acc + i * a.ld, a.ld, a.grad_shared + (first + i) * a.ld);
      a.grad_offset[first + i] = static_cast<T>(sum[i]);
    }
  }
}

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
  Buffer<T> sums(2 * width);
  T *total = sums, *link = sums + width;
  for (int64_t u = a.begin; u < a.end; ++u) {
    std::fill_n(total, width, T(0));
    double bias = 0;
    for (int64_t at = a.start[u]; at < a.start[u + 1];) {
      T* sum = at == a.start[u] ? total : link;
      if (sum == link) std::fill_n(sum, width, T(0));
      for (int64_t stop = std::min(at + LINK, a.start[u + 1]); at < stop; ++at) {
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

FASTREC_DEFINE_PER_ISA(own_forward, SampledArgs, own_forward_rows)
FASTREC_DEFINE_PER_ISA(shared_forward, SampledArgs, shared_forward_blocks)
FASTREC_DEFINE_PER_ISA(shared_backward, SampledArgs, shared_backward_blocks)
FASTREC_DEFINE_PER_ISA(sum_sorted, SumArgs, sum_entries)

}  // namespace fastrec
