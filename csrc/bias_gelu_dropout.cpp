// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::bias_gelu_dropout_fwd and _bwd. A task owns CHUNK rows.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "gelu.h"
#include "layer_norm.h"

namespace fastrec {
namespace {

template <class S, int N, class T = typename S::T>
FASTREC_INLINE void gelu(const T* x, const T* bias, T* out) {
  typename S::V z[N], cdf[N], density[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) z[i] = S::load(x + i * S::lanes) + S::load(bias + i * S::lanes);
  normal<S, N>(z, cdf, density);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) S::store(out + i * S::lanes, z[i] * cdf[i]);
}

template <class S, int N, class T = typename S::T>
FASTREC_INLINE void gelu_backward(const T* x, const T* bias, const T* grad, T* out, T* grad_bias) {
  typename S::V z[N], cdf[N], density[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) z[i] = S::load(x + i * S::lanes) + S::load(bias + i * S::lanes);
  normal<S, N>(z, cdf, density);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    typename S::V g = S::load(grad + i * S::lanes) * (cdf[i] + z[i] * density[i]);
    S::store(out + i * S::lanes, g);
    S::store(grad_bias + i * S::lanes, S::load(grad_bias + i * S::lanes) + g);
  }
}

// Rows [begin, end), D width. Where D is not a multiple of a vector, rows pass through padded
// scratch, so the vector code sees whole vectors only.
template <class T>
struct GeluArgs {
  int64_t begin, end, width;
  Rows input, grad_output;
  const T* bias;  // padded to whole vectors
  Dropout dropout;
  void* out;
  ScalarType dtype;
  T* grad_bias;  // of this chunk, padded; backward only
};

template <class S>
FASTREC_INLINE const typename S::T* whole_vectors(const typename S::T* row,
                                                  typename S::T* scratch, int64_t width) {
  if (width % S::lanes == 0) return row;
  if (row != scratch) std::copy_n(row, width, scratch);
  return scratch;
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_rows(const GeluArgs<T>& a) {
  const int64_t width = a.width, padded_width = round_up(width, S::lanes);
  const bool direct = a.dtype == compute_dtype<T>() && padded_width == width;
  Buffer<T> x(padded_width), y(padded_width), masked(padded_width);
  std::fill_n(static_cast<T*>(x), padded_width, T(0));
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    const T* in = whole_vectors<S>(row_of<T>(a.input, i, x, width), x, width);
    T* target = direct ? static_cast<T*>(a.out) + i * width : masked;
    T* out = a.dropout.drop ? y : target;
    for_vectors<S>(
        padded_width,
        [&](int64_t d) __attribute__((always_inline)) { gelu<S, 4>(in + d, a.bias + d, out + d); },
        [&](int64_t d) __attribute__((always_inline)) { gelu<S, 1>(in + d, a.bias + d, out + d); });
    if (a.dropout.drop) mask.apply(i, a.end, out, target);
    if (!direct) store_row<T>(target, a.out, a.dtype, i * width, width);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_rows(const GeluArgs<T>& a) {
  const int64_t width = a.width, padded_width = round_up(width, S::lanes);
  const bool direct = a.dtype == compute_dtype<T>() && padded_width == width;
  Buffer<T> x(padded_width), g(padded_width), y(padded_width), masked(padded_width);
  for (T* buffer : {static_cast<T*>(x), static_cast<T*>(g), static_cast<T*>(masked)})
    std::fill_n(buffer, padded_width, T(0));
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    const T* in = whole_vectors<S>(row_of<T>(a.input, i, x, width), x, width);
    const T* grad = row_of<T>(a.grad_output, i, g, width);
    if (a.dropout.drop) {
      mask.apply(i, a.end, grad, masked);
      grad = masked;
    } else {
      grad = whole_vectors<S>(grad, g, width);
    }
    T* out = direct ? static_cast<T*>(a.out) + i * width : y;
    for_vectors<S>(
        padded_width,
        [&](int64_t d) __attribute__((always_inline)) {
          gelu_backward<S, 4>(in + d, a.bias + d, grad + d, out + d, a.grad_bias + d);
        },
        [&](int64_t d) __attribute__((always_inline)) {
          gelu_backward<S, 1>(in + d, a.bias + d, grad + d, out + d, a.grad_bias + d);
        });
    if (!direct) store_row<T>(out, a.out, a.dtype, i * width, width);
  }
}

FASTREC_DEFINE_PER_ISA(forward, GeluArgs, forward_rows)
FASTREC_DEFINE_PER_ISA(backward, GeluArgs, backward_rows)

constexpr int64_t LINE = 16;  // the lanes of the widest vector

template <class T>
Buffer<T> padded_bias(const std::optional<Tensor>& bias, int64_t width) {
  Vector<T> values(bias, width);
  Buffer<T> out(round_up(width, LINE));
  std::fill_n(static_cast<T*>(out), round_up(width, LINE), T(0));
  std::copy_n(static_cast<const T*>(values), width, static_cast<T*>(out));
  return out;
}

template <class T>
Tensor forward_typed(const Tensor& input, const std::optional<Tensor>& bias,
                     const DropoutTensors& dropout) {
  int64_t rows = input.size(0), width = input.size(1);
  dropout.check_rows(rows);
  Matrix in(input);
  Buffer<T> b = padded_bias<T>(bias, width);
  Tensor output = torch::stable::new_empty(input, {rows, width});
  GeluArgs<T> all{0, rows, width, in.rows, {}, b, dropout.value, output.data_ptr(),
                  output.scalar_type(), nullptr};
  parallel_for(0, rows, CHUNK, [&](int64_t begin, int64_t end) {
    GeluArgs<T> mine = all;
    mine.begin = begin, mine.end = end;
    forward<T>(mine);
  });
  return output;
}

template <class T>
std::tuple<Tensor, Tensor> backward_typed(const Tensor& grad_output, const Tensor& input,
                                          const std::optional<Tensor>& bias,
                                          const DropoutTensors& dropout) {
  int64_t rows = input.size(0), width = input.size(1), stride = round_up(width, LINE);
  int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  dropout.check_rows(rows);
  check_size("grad_output", grad_output, {rows, width});
  Matrix in(input), grad(grad_output);
  Buffer<T> b = padded_bias<T>(bias, width), partials(chunks * stride);
  Tensor grad_input = torch::stable::new_empty(input, {rows, width});
  Tensor grad_bias = torch::stable::new_empty(bias ? *bias : input, {bias ? width : 0});
  GeluArgs<T> all{0, rows, width, in.rows, grad.rows, b, dropout.value, grad_input.data_ptr(),
                  grad_input.scalar_type(), nullptr};
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      GeluArgs<T> mine = all;
      mine.begin = c * CHUNK, mine.end = std::min(rows, mine.begin + CHUNK);
      mine.grad_bias = partials + c * stride;
      std::fill_n(mine.grad_bias, stride, T(0));
      backward<T>(mine);
    }
  });
  if (bias)
    sum_chunks<T>(partials, chunks, stride, width, grad_bias.data_ptr(), grad_bias.scalar_type());
  return {grad_input, grad_bias};
}

Tensor bias_gelu_dropout_fwd(Tensor input, std::optional<Tensor> bias,
                             std::optional<Tensor> keys, std::optional<Tensor> positions,
                             std::optional<Tensor> rng, int64_t drop, int64_t site,
                             int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, bias, dropout);
}

std::tuple<Tensor, Tensor> bias_gelu_dropout_bwd(
    Tensor grad_output, Tensor input, std::optional<Tensor> bias, std::optional<Tensor> keys,
    std::optional<Tensor> positions, std::optional<Tensor> rng, int64_t drop, int64_t site,
    int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto* typed = input.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(grad_output, input, bias, dropout);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("bias_gelu_dropout_fwd", TORCH_BOX(&fastrec::bias_gelu_dropout_fwd));
  m.impl("bias_gelu_dropout_bwd", TORCH_BOX(&fastrec::bias_gelu_dropout_bwd));
}
