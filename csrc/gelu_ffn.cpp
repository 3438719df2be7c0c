// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::gelu_ffn_fwd and _bwd. A block of rows goes through both products while it
// lies in the caches, WIDE inner features at a time; backward computes the inner features again.
//
// Legend: T rows, D input width, F inner width, E output width, x input, z = x W_in^T + b_in,
// h = GELU(z), g = grad_output, dz = (g W_out) GELU'(z).
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "gelu.h"
#include "pack.h"

namespace fastrec {
namespace {

constexpr int64_t WIDE = 128;
constexpr int64_t LD = WIDE + 16;  // 9 cache lines: rows of a block are spread over the sets

template <class T>
struct FfnArgs {
  int64_t begin, end, d, f, e;
  const T* x;
  int64_t x_row;
  const T *in_panels, *bias_in;    // D x F; padded
  const T *out_panels, *bias_out;  // F x E; forward only
  T* out;                          // [T, E], or the gradient of x [T, D], which may be null
  const T* g;                      // backward
  int64_t g_row;
  const T *grad_panels, *back_panels;        // W_out as E x F, W_in as F x D
  T *weight_in, *sum_in, *weight_out, *sum_out;  // sums over the rows, padded; null if not needed
};

template <class S, class T = typename S::T>
FASTREC_INLINE void copy_block(const T* block, int64_t ld, int64_t rows, int64_t width, T* out) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(block + i * ld, width, out + i * width);
}

template <class S, int N, class T = typename S::T>
FASTREC_INLINE void gelu(T* z) {
  typename S::V v[N], cdf[N], density[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] = S::load(z + i * S::lanes);
  normal<S, N>(v, cdf, density);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) S::store(z + i * S::lanes, v[i] * cdf[i]);
}

// z -> GELU(z), grad -> grad GELU'(z), which is also added to `sum`.
template <class S, int N, class T = typename S::T>
FASTREC_INLINE void gelu_backward(T* z, T* grad, T* sum) {
  typename S::V v[N], cdf[N], density[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) v[i] = S::load(z + i * S::lanes);
  normal<S, N>(v, cdf, density);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    typename S::V dz = S::load(grad + i * S::lanes) * (cdf[i] + v[i] * density[i]);
    S::store(z + i * S::lanes, v[i] * cdf[i]);
    S::store(grad + i * S::lanes, dz);
    S::store(sum + i * S::lanes, S::load(sum + i * S::lanes) + dz);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_rows(const FfnArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  const int64_t width = round_up(a.e, LANES);
  Buffer<T> h(BLOCK_ROWS * LD), y(BLOCK_ROWS * width);
  const T one = 1;
  for (int64_t i = a.begin; i < a.end; i += BLOCK_ROWS) {
    const int64_t rows = std::min(BLOCK_ROWS, a.end - i);
    for (int64_t f = 0; f < a.f; f += WIDE) {
      const int64_t count = std::min(WIDE, a.f - f), padded = round_up(count, S::lanes);
      product<S>({rows, a.d, count, a.x + i * a.x_row, a.x_row, 1, a.in_panels + f * a.d, NR,
                  a.d * NR, h, LD, &one, 0, false, a.bias_in + f});
      for (int64_t r = 0; r < rows; ++r) {
        T* row = h + r * LD;
        for_vectors<S>(
            padded, [&](int64_t n) __attribute__((always_inline)) { gelu<S, 4>(row + n); },
            [&](int64_t n) __attribute__((always_inline)) { gelu<S, 1>(row + n); });
      }
      product<S>({rows, count, a.e, h, LD, 1, a.out_panels + f * NR, NR, a.f * NR, y, width, &one,
                  0, f > 0, f > 0 ? nullptr : a.bias_out});
    }
    copy_block<S, T>(y, width, rows, a.e, a.out + i * a.e);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_rows(const FfnArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  const int64_t d_width = round_up(a.d, LANES), f_width = round_up(a.f, LANES);
  Buffer<T> h(BLOCK_ROWS * LD), dz(BLOCK_ROWS * LD), dx(BLOCK_ROWS * d_width), link(WIDE);
  Buffer<T> x_panels(BLOCK_ROWS * round_up(a.d, NR)), g_sum(a.e);
  const T one = 1;
  for (int64_t t = a.begin; t < a.end; t += BLOCK_ROWS) {
    const int64_t rows = std::min(BLOCK_ROWS, a.end - t);
    const bool add = t > a.begin;
    const T *x = a.x + t * a.x_row, *g = a.g + t * a.g_row;
    if (a.weight_in) pack<S, T>({x, a.x_row, 1, rows, a.d, x_panels});
    for (int64_t f = 0; f < a.f; f += WIDE) {
      const int64_t count = std::min(WIDE, a.f - f), padded = round_up(count, S::lanes);
      product<S>({rows, a.d, count, x, a.x_row, 1, a.in_panels + f * a.d, NR, a.d * NR, h, LD,
                  &one, 0, false, a.bias_in + f});
      product<S>({rows, a.e, count, g, a.g_row, 1, a.grad_panels + f * a.e, NR, a.e * NR, dz, LD,
                  &one, 0, false, nullptr});
      T* sum = link;
      std::fill_n(sum, WIDE, T(0));
      for (int64_t r = 0; r < rows; ++r) {
        T *z = h + r * LD, *grad = dz + r * LD;
        for_vectors<S>(
            padded,
            [&](int64_t n) __attribute__((always_inline)) {
              gelu_backward<S, 4>(z + n, grad + n, sum + n);
            },
            [&](int64_t n) __attribute__((always_inline)) {
              gelu_backward<S, 1>(z + n, grad + n, sum + n);
            });
      }
      if (a.out)
        product<S>({rows, count, a.d, dz, LD, 1, a.back_panels + f * NR, NR, a.f * NR, dx, d_width,
                    &one, 0, f > 0, nullptr});
      if (!a.weight_in) continue;
      product<S>({count, rows, a.d, dz, 1, LD, x_panels, NR, rows * NR, a.weight_in + f * d_width,
                  d_width, &one, 0, add, nullptr});
      product<S>({a.e, rows, count, g, 1, a.g_row, h, LD, NR, a.weight_out + f, f_width, &one, 0,
                  add, nullptr});
      for (int64_t n = 0; n < count; ++n) a.sum_in[f + n] = (add ? a.sum_in[f + n] : 0) + sum[n];
    }
    if (a.out) copy_block<S, T>(dx, d_width, rows, a.d, a.out + t * a.d);
    if (a.weight_in) add_link<T>(g, a.g_row, rows, a.e, add, g_sum, a.sum_out);
  }
}

FASTREC_DEFINE_PER_ISA(ffn_forward, FfnArgs, forward_rows)
FASTREC_DEFINE_PER_ISA(ffn_backward, FfnArgs, backward_rows)

template <class T>
struct Layer {
  Layer(const Tensor& input, const Tensor& weight_in, const Tensor& bias_in,
        const Tensor& weight_out)
      : x(input),
        w_in(torch::stable::contiguous(weight_in)),
        w_out(torch::stable::contiguous(weight_out)),
        d(weight_in.size(1)),
        f(weight_in.size(0)),
        e(weight_out.size(0)),
        in_panels(packed<T>(data<T>(w_in), 1, d, d, f)),
        b_in(padded<T>(bias_in, f)) {
    check_size("input", input, {input.size(0), d});
    check_size("weight_out", weight_out, {e, f});
    args.end = input.size(0), args.d = d, args.f = f, args.e = e;
    args.x = x.elements<T>();
    args.x_row = x.rows.stride / int64_t(sizeof(T));
    args.in_panels = in_panels, args.bias_in = b_in;
  }

  Matrix x;
  Tensor w_in, w_out;
  int64_t d, f, e;
  Buffer<T> in_panels, b_in;
  FfnArgs<T> args{};
};

template <class T>
Tensor forward_typed(const Tensor& input, const Tensor& weight_in, const Tensor& bias_in,
                     const Tensor& weight_out, const Tensor& bias_out) {
  Layer<T> layer(input, weight_in, bias_in, weight_out);
  int64_t count = input.size(0);
  Tensor out = torch::stable::new_empty(input, {count, layer.e});
  Buffer<T> out_panels = packed<T>(data<T>(layer.w_out), 1, layer.f, layer.f, layer.e);
  Buffer<T> b_out = padded<T>(bias_out, layer.e);
  layer.args.out_panels = out_panels, layer.args.bias_out = b_out;
  layer.args.out = data<T>(out);
  parallel_for(0, count, BLOCK_ROWS, [&](int64_t begin, int64_t end) {
    FfnArgs<T> mine = layer.args;
    mine.begin = begin, mine.end = end;
    ffn_forward<T>(mine);
  });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward_typed(const Tensor& grad_output, const Tensor& input, const Tensor& weight_in,
                         const Tensor& bias_in, const Tensor& weight_out, bool input_needed,
                         bool weights_needed) {
  Layer<T> layer(input, weight_in, bias_in, weight_out);
  Matrix g(grad_output);
  int64_t count = input.size(0), d = layer.d, f = layer.f, e = layer.e;
  check_size("grad_output", grad_output, {count, e});
  Tensor grad_input = torch::stable::new_empty(input, {input_needed ? count : 0, d});
  Buffer<T> grad_panels = packed<T>(data<T>(layer.w_out), f, 1, e, f);
  Buffer<T> back_panels = packed<T>(data<T>(layer.w_in), d, 1, f, d);
  FfnArgs<T>& all = layer.args;
  all.g = g.elements<T>();
  all.g_row = g.rows.stride / int64_t(sizeof(T));
  all.grad_panels = grad_panels, all.back_panels = back_panels;
  all.out = input_needed ? data<T>(grad_input) : nullptr;
  int64_t d_width = round_up(d, LANES), f_width = round_up(f, LANES);
  const int64_t range = rows_of_a_range(count), ranges = (count + range - 1) / range;
  const int64_t at_sum = f * d_width, at_out = at_sum + f, at_last = at_out + e * f_width;
  const int64_t size = at_last + e;
  Buffer<T> partials(weights_needed ? std::max<int64_t>(1, ranges) * size : 1);
  parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      FfnArgs<T> mine = all;
      mine.begin = r * range, mine.end = std::min(count, mine.begin + range);
      T* own = partials + r * size;
      if (weights_needed) {
        mine.weight_in = own, mine.sum_in = own + at_sum;
        mine.weight_out = own + at_out, mine.sum_out = own + at_last;
      }
      ffn_backward<T>(mine);
    }
  });
  auto joined = [&](int64_t at, int64_t rows, int64_t width, int64_t columns) {
    Tensor out = torch::stable::new_empty(weight_in, {weights_needed ? rows : 0, columns});
    for (int64_t i = 0; i < out.size(0); ++i)
      add_ranges(partials + at + i * width, ranges, size, columns,
                 data<T>(out) + i * columns);
    return out;
  };
  return {grad_input, joined(0, f, d_width, d), joined(at_sum, 1, f, f),
          joined(at_out, e, f_width, f), joined(at_last, 1, e, e)};
}

Tensor gelu_ffn_fwd(Tensor input, Tensor weight_in, Tensor bias_in, Tensor weight_out,
                    Tensor bias_out) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, weight_in, bias_in, weight_out, bias_out);
}

Gradients gelu_ffn_bwd(Tensor grad_output, Tensor input, Tensor weight_in, Tensor bias_in,
                       Tensor weight_out, bool input_needed, bool weights_needed) {
  auto* typed = input.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(grad_output, input, weight_in, bias_in, weight_out, input_needed, weights_needed);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("gelu_ffn_fwd", TORCH_BOX(&fastrec::gelu_ffn_fwd));
  m.impl("gelu_ffn_bwd", TORCH_BOX(&fastrec::gelu_ffn_bwd));
}
