// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::linear_fwd and _bwd. Tasks own rows of the output and of the gradient of
// the input; for the gradient of the weight they own ranges of rows, whose partial sums are added
// in order.
//
// Legend: T rows, K input width, N output width.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pack.h"

namespace fastrec {
namespace {

constexpr int64_t LINK = 128;  // rows of a chain of additions of grad_weight

// out[i] = a[i] * panels + bias for the rows [begin, end).
template <class T>
struct RowsArgs {
  int64_t begin, end, depth, columns;
  const T* a;
  int64_t a_row;
  const T *panels, *bias;  // bias is padded, or null
  T* out;                  // contiguous
};

template <class S, class T = typename S::T>
FASTREC_INLINE void multiply_rows(const RowsArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  const bool whole = a.columns % S::lanes == 0;
  const int64_t width = whole ? a.columns : round_up(a.columns, LANES);
  Buffer<T> scratch(whole ? 0 : BLOCK_ROWS * width);
  const T one = 1;
  for (int64_t i = a.begin; i < a.end; i += BLOCK_ROWS) {
    const int64_t rows = std::min(BLOCK_ROWS, a.end - i);
    T* out = whole ? a.out + i * width : static_cast<T*>(scratch);
    product<S>({rows, a.depth, a.columns, a.a + i * a.a_row, a.a_row, 1, a.panels, NR,
                a.depth * NR, out, width, &one, 0, false, a.bias});
    if (whole) continue;
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(out + r * width, a.columns, a.out + (i + r) * a.columns);
  }
}

// weight [N, width] = grad^T input and bias [N] = sum of grad over the rows [begin, end); either may
// be null.
template <class T>
struct SumsArgs {
  int64_t begin, end, n, k, width;
  const T* grad;
  int64_t grad_row;
  const T* input;
  int64_t input_row;
  T *weight, *bias;
};

template <class S, class T = typename S::T>
FASTREC_INLINE void sum_rows(const SumsArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  Buffer<T> panels(LINK * round_up(a.k, NR)), link(a.n);
  const T one = 1;
  for (int64_t t = a.begin; t < a.end; t += LINK) {
    const int64_t rows = std::min(LINK, a.end - t);
    const T* grad = a.grad + t * a.grad_row;
    if (a.weight) {
      pack<S, T>({a.input + t * a.input_row, a.input_row, 1, rows, a.k, panels});
      product<S>({a.n, rows, a.k, grad, 1, a.grad_row, panels, NR, rows * NR, a.weight, a.width,
                  &one, 0, t > a.begin, nullptr});
    }
    if (a.bias) add_link<T>(grad, a.grad_row, rows, a.n, t > a.begin, link, a.bias);
  }
}

FASTREC_DEFINE_PER_ISA(linear_rows, RowsArgs, multiply_rows)
FASTREC_DEFINE_PER_ISA(linear_sums, SumsArgs, sum_rows)

// A [rows, depth] times a matrix of `columns` columns whose element (k, n) is at
// b[k * b_row + n * b_column].
template <class T>
Tensor times(const Tensor& a, const T* b, int64_t b_row, int64_t b_column, int64_t columns,
             const std::optional<Tensor>& bias) {
  Matrix rows(a);
  int64_t count = a.size(0), depth = a.size(1);
  Tensor out = torch::stable::new_empty(a, {count, columns});
  if (depth == 0) {  // no product: the bias alone
    Vector<T> row(bias, columns);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(static_cast<const T*>(row), columns,
                  data<T>(out) + i * columns);
    return out;
  }
  Buffer<T> panels = packed(b, b_row, b_column, depth, columns);
  std::optional<Buffer<T>> bias_row;
  if (bias) bias_row.emplace(padded<T>(*bias, columns));
  RowsArgs<T> all{0, count, depth, columns, rows.elements<T>(),
                  rows.rows.stride / int64_t(sizeof(T)), panels,
                  bias ? static_cast<const T*>(*bias_row) : nullptr, data<T>(out)};
  parallel_for(0, count, BLOCK_ROWS, [&](int64_t begin, int64_t end) {
    RowsArgs<T> mine = all;
    mine.begin = begin, mine.end = end;
    linear_rows<T>(mine);
  });
  return out;
}

template <class T>
void sums(const Tensor& grad, const Tensor& input, Tensor& weight, Tensor& bias, bool weight_needed,
          bool bias_needed) {
  Matrix g(grad), x(input);
  int64_t count = grad.size(0), n = grad.size(1), k = input.size(1), width = round_up(k, LANES);
  int64_t range = rows_of_a_range(count);
  int64_t ranges = (count + range - 1) / range, size = n * (width + 1);
  Buffer<T> partials(std::max<int64_t>(1, ranges) * size);
  SumsArgs<T> all{0, 0, n, k, width, g.elements<T>(),
                  g.rows.stride / int64_t(sizeof(T)), x.elements<T>(),
                  x.rows.stride / int64_t(sizeof(T)), nullptr, nullptr};
  parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      SumsArgs<T> mine = all;
      mine.begin = r * range, mine.end = std::min(count, mine.begin + range);
      if (weight_needed && k > 0) mine.weight = partials + r * size;
      if (bias_needed) mine.bias = partials + r * size + n * width;
      linear_sums<T>(mine);
    }
  });
  const T* from = partials;
  if (weight_needed)
    for (int64_t i = 0; i < n; ++i)
      add_ranges(from + i * width, ranges, size, k, data<T>(weight) + i * k);
  if (bias_needed)
    add_ranges(from + n * width, ranges, size, n, data<T>(bias));
}

Tensor linear_fwd(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  check_size("weight", weight, {weight.size(0), input.size(1)});
  Tensor w = torch::stable::contiguous(weight);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    int64_t depth = w.size(1);
    return times<T>(input, data<T>(w), 1, depth, w.size(0), bias);
  };
  return input.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor grad_output, Tensor input, Tensor weight,
                                              bool input_needed, bool weight_needed,
                                              bool bias_needed) {
  int64_t n = weight.size(0), k = weight.size(1);
  check_size("input", input, {input.size(0), k});
  check_size("grad_output", grad_output, {input.size(0), n});
  Tensor w = torch::stable::contiguous(weight);
  Tensor grad_weight = torch::stable::new_empty(weight, {weight_needed ? n : 0, k});
  Tensor grad_bias = torch::stable::new_empty(weight, {bias_needed ? n : 0});
  auto run = [&](auto zero) {
    using T = decltype(zero);
    if (weight_needed || bias_needed)
      sums<T>(grad_output, input, grad_weight, grad_bias, weight_needed, bias_needed);
    if (!input_needed) return torch::stable::new_empty(input, {0, k});
    return times<T>(grad_output, data<T>(w), k, 1, k, std::nullopt);
  };
  Tensor grad_input = input.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&fastrec::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&fastrec::linear_bwd));
}
