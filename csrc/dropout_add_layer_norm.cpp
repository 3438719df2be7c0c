// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::dropout_add_layer_norm_fwd and _bwd. A task owns CHUNK rows; a row stays
// in the L1 cache from its first to its last pass.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "layer_norm.h"

namespace fastrec {
namespace {

// Rows [begin, end) of T rows, D width.
template <class T>
struct JointForward {
  int64_t begin, end, width;
  Rows input, residual;  // residual.data is null without one
  const T *weight, *bias;
  T eps;
  Dropout dropout;
  void *output, *sum;  // sum is null where it equals the input
  ScalarType dtype;
  T *mean, *rstd;
};

template <class T>
struct JointBackward {
  int64_t begin, end, width;
  Rows grad_output, grad_sum, sum;  // data is null for a gradient that is 0
  const T *mean, *rstd, *weight;
  Dropout dropout;
  void *grad_input, *grad_residual;  // grad_input is null where it equals grad_residual
  ScalarType input_dtype, dtype;
  T *grad_weight, *grad_bias;  // of this chunk
};

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_rows(const JointForward<T>& a) {
  const int64_t width = a.width;
  Buffer<T> x(width), r(width), y(width), z(width);
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    const T* total = row_of<T>(a.input, i, x, width);
    T* sum = a.sum ? target_row<T>(a.sum, a.dtype, i, z, width) : nullptr;
    if (a.dropout.drop) {
      mask.apply(i, a.end, total, sum);
      total = sum;
    }
    if (a.residual.data) {
      const T* residual = row_of<T>(a.residual, i, r, width);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) sum[d] = residual[d] + total[d];
      total = sum;
    }
    if (sum && a.dtype != compute_dtype<T>()) {
      // Backward sees the rounded sum: statistics of another would not belong to it.
      finish_row(sum, a.sum, a.dtype, i, width);
      Rows{static_cast<const char*>(a.sum), width * 2, a.dtype}.load(i, sum, width);
    }
    T* out = target_row<T>(a.output, a.dtype, i, y, width);
    normalize_row(total, a.weight, a.bias, a.eps, width, out, a.mean[i], a.rstd[i]);
    finish_row(out, a.output, a.dtype, i, width);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_rows(const JointBackward<T>& a) {
  const int64_t width = a.width;
  Buffer<T> z(width), g(width), h(width), out(width), masked(width);
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    T* grad = target_row<T>(a.grad_residual, a.dtype, i, out, width);
    if (a.grad_output.data) {
      normalize_row_backward(row_of<T>(a.sum, i, z, width), a.mean[i], a.rstd[i],
                             row_of<T>(a.grad_output, i, g, width), a.weight, width, grad,
                             a.grad_weight, a.grad_bias);
    } else {
      std::fill_n(grad, width, T(0));
    }
    if (a.grad_sum.data) {
      const T* more = row_of<T>(a.grad_sum, i, h, width);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) grad[d] += more[d];
    }
    finish_row(grad, a.grad_residual, a.dtype, i, width);
    if (!a.grad_input) continue;
    T* grad_input = target_row<T>(a.grad_input, a.input_dtype, i, masked, width);
    if (a.dropout.drop)
      mask.apply(i, a.end, grad, grad_input);
    else
      std::copy_n(grad, width, grad_input);
    finish_row(grad_input, a.grad_input, a.input_dtype, i, width);
  }
}

FASTREC_DEFINE_PER_ISA(forward, JointForward, forward_rows)
FASTREC_DEFINE_PER_ISA(backward, JointBackward, backward_rows)

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_typed(
    const Tensor& input, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    const DropoutTensors& dropout) {
  int64_t rows = input.size(0), width = input.size(1);
  dropout.check_rows(rows);
  check_size("residual", residual, {rows, width});
  Matrix in(input), res(residual);
  ScalarType dtype = residual ? promote(input.scalar_type(), residual->scalar_type())
                              : input.scalar_type();
  STD_TORCH_CHECK(dtype != ScalarType::Double || compute_dtype<T>() == dtype,
                  "input must be Double where residual is");
  bool plain = !residual && !dropout.value.drop;
  Tensor output = torch::stable::new_empty(input, {rows, width}, dtype);
  Tensor sum = torch::stable::new_empty(input, {plain ? 0 : rows, width}, dtype);
  Tensor mean = torch::stable::new_empty(input, {rows}, compute_dtype<T>());
  Tensor rstd = torch::stable::new_empty(input, {rows}, compute_dtype<T>());
  Vector<T> scale(weight, width, T(1)), shift(bias, width, T(0));
  JointForward<T> all{0, rows, width, in.rows, res.rows, scale, shift, static_cast<T>(eps),
                      dropout.value, output.data_ptr(), plain ? nullptr : sum.data_ptr(), dtype,
                      data<T>(mean), data<T>(rstd)};
  parallel_for(0, rows, CHUNK, [&](int64_t begin, int64_t end) {
    JointForward<T> mine = all;
    mine.begin = begin, mine.end = end;
    forward<T>(mine);
  });
  return {output, sum, mean, rstd};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_typed(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_sum,
    const Tensor& sum, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, ScalarType input_dtype, const DropoutTensors& dropout) {
  int64_t rows = sum.size(0), width = sum.size(1), chunks = (rows + CHUNK - 1) / CHUNK;
  dropout.check_rows(rows);
  check_size("grad_output", grad_output, {rows, width});
  check_size("grad_sum", grad_sum, {rows, width});
  bytes_of(input_dtype);
  ScalarType dtype = sum.scalar_type();
  bool both = !dropout.value.drop && input_dtype == dtype;
  Matrix dy(grad_output), dz(grad_sum), z(sum);
  Vector<T> scale(weight, width, T(1)), mu(mean, rows), s(rstd, rows);
  Tensor grad_input = torch::stable::new_empty(sum, {both ? 0 : rows, width}, input_dtype);
  Tensor grad_residual = torch::stable::new_empty(sum, {rows, width});
  Tensor grad_weight = torch::stable::new_empty(weight ? *weight : mean, {weight ? width : 0});
  Tensor grad_bias = torch::stable::new_empty(bias ? *bias : mean, {bias ? width : 0});
  Buffer<T> partials(chunks * 2 * width);
  JointBackward<T> all{0, rows, width, dy.rows, dz.rows, z.rows, mu, s, scale, dropout.value,
                       both ? nullptr : grad_input.data_ptr(), grad_residual.data_ptr(),
                       input_dtype, dtype, nullptr, nullptr};
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      JointBackward<T> mine = all;
      mine.begin = c * CHUNK, mine.end = std::min(rows, mine.begin + CHUNK);
      mine.grad_weight = partials + c * 2 * width;
      mine.grad_bias = mine.grad_weight + width;
      std::fill_n(mine.grad_weight, 2 * width, T(0));
      backward<T>(mine);
    }
  });
  if (weight)
    sum_chunks<T>(partials, chunks, 2 * width, width, grad_weight.data_ptr(),
                  grad_weight.scalar_type());
  if (bias)
    sum_chunks<T>(partials + width, chunks, 2 * width, width, grad_bias.data_ptr(),
                  grad_bias.scalar_type());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
    Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, std::optional<Tensor> keys,
    std::optional<Tensor> positions, std::optional<Tensor> rng, int64_t drop, int64_t site,
    int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, residual, weight, bias, eps, dropout);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_sum, Tensor sum, Tensor mean,
    Tensor rstd, std::optional<Tensor> weight, std::optional<Tensor> bias, ScalarType input_dtype,
    std::optional<Tensor> keys, std::optional<Tensor> positions, std::optional<Tensor> rng,
    int64_t drop, int64_t site, int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto* typed = sum.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                        : backward_typed<float>;
  return typed(grad_output, grad_sum, sum, mean, rstd, weight, bias, input_dtype, dropout);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&fastrec::dropout_add_layer_norm_fwd));
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fastrec::dropout_add_layer_norm_bwd));
}
