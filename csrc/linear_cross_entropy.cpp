// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::linear_cross_entropy_fwd, _bwd, _update_ and _value_and_grad: tensors in and out.
// The calls of the kernels are in linear_cross_entropy_tasks.h, the arithmetic in
// linear_cross_entropy.h and linear_cross_entropy_stored.h, the products in gemm.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "linear_cross_entropy_tasks.h"

namespace fastrec {
namespace {

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_typed(const Tensor& input, const Tensor& linear_weight,
                                                 const std::optional<Tensor>& linear_bias,
                                                 const Tensor& target, bool with_offset) {
  Scored<T> scored(input, linear_weight, linear_bias, target);
  const Problem<T>& q = scored.problem;
  int64_t rows = input.size(0), mean_rows = with_offset ? rows : 0;
  Tensor lse = torch::stable::new_zeros(input, {2, rows}, compute_dtype<T>());
  Tensor target_logit = torch::stable::new_zeros(input, {rows}, compute_dtype<T>());
  Tensor mean_offset = torch::stable::new_zeros(input, {mean_rows, q.width}, compute_dtype<T>());
  T *lse_out = data<T>(lse), *logit_out = data<T>(target_logit), *mean_out = data<T>(mean_offset);
  forward_sweep(q, with_offset, [&](int64_t i, const ForwardArgs<T>& a) {
    int64_t row = scored.row[i];
    combine(a, i, lse_out[row], lse_out[rows + row],
            with_offset ? mean_out + row * q.width : nullptr);
    logit_out[row] = a.target_logit[i];
  });
  return {lse, target_logit, mean_offset};
}

template <class T>
std::vector<T> gather(const Tensor& values, const std::vector<int64_t>& rows, int64_t first = 0) {
  Tensor source = torch::stable::contiguous(values);
  const T* from = data<T>(source) + first;
  std::vector<T> out;
  out.reserve(rows.size());
  for (int64_t row : rows) out.push_back(from[row]);
  return out;
}

// `backward_sweep` of tensors [T] with the rows that are not scored.
template <class T>
void backward_of(const Scored<T>& scored, const Tensor& input, const Tensor& lse,
                 const Tensor& grad_lse, const Tensor& grad_target_logit,
                 const BackwardArgs<T>& a) {
  check_size("lse", lse, {2, input.size(0)});
  check_size("grad_lse", grad_lse, {input.size(0)});
  check_size("grad_target_logit", grad_target_logit, {input.size(0)});
  std::vector<T> row_grad = gather<T>(grad_lse, scored.row);
  std::vector<T> target_grad = gather<T>(grad_target_logit, scored.row);
  std::vector<T> rest = gather<T>(lse, scored.row, grad_lse.size(0));
  for (size_t i = 0; i < rest.size(); ++i) row_grad[i] *= std::exp(-rest[i]);
  backward_sweep(scored.problem, gather<T>(lse, scored.row), row_grad.data(), target_grad.data(), a);
}

template <class T>
std::tuple<Tensor, Tensor> backward_typed(const Tensor& input, const Tensor& linear_weight,
                                          const std::optional<Tensor>& linear_bias,
                                          const Tensor& target, const Tensor& lse,
                                          const Tensor& grad_lse, const Tensor& grad_target_logit) {
  Scored<T> scored(input, linear_weight, linear_bias, target);
  const Problem<T>& q = scored.problem;
  Tensor grad_weight = torch::stable::new_empty(linear_weight, {q.items, q.width});
  Tensor grad_bias = torch::stable::new_empty(linear_bias ? *linear_bias : lse,
                                              {linear_bias ? q.items : 0});
  BackwardArgs<T> a{};
  a.grad_weight = grad_weight.data_ptr(), a.weight_dtype = grad_weight.scalar_type();
  a.grad_bias = linear_bias ? grad_bias.data_ptr() : nullptr;
  a.bias_dtype = grad_bias.scalar_type();
  backward_of(scored, input, lse, grad_lse, grad_target_logit, a);
  return {grad_weight, grad_bias};
}

template <class T>
void update_typed(const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
                  const Tensor& input, const Tensor& target, const Tensor& lse,
                  const Tensor& grad_lse, const Tensor& grad_target_logit, const Tensor& rows,
                  const Tensor& grad_rows, RowUpdate<T> update) {
  Scored<T> scored(input, linear_weight, linear_bias, target);
  check_size("grad_rows", grad_rows, {rows.size(0), linear_weight.size(1)});
  STD_TORCH_CHECK(linear_weight.is_contiguous() && (!linear_bias || linear_bias->is_contiguous()),
                  "what is updated must be contiguous");
  Tensor ids = torch::stable::contiguous(rows), more = torch::stable::contiguous(grad_rows);
  update.table = data<T>(linear_weight), update.bias = data_or_null<T>(linear_bias);
  update.rows = int64_data(ids), update.grad = data<T>(more), update.count = rows.size(0);
  BackwardArgs<T> a{};
  a.update = &update;
  backward_of(scored, input, lse, grad_lse, grad_target_logit, a);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> value_and_grad_typed(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
    const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index, bool mean,
    bool with_input, bool with_weight) {
  Scored<T> scored(input, linear_weight, linear_bias, target, ignore_index);
  const Problem<T>& q = scored.problem;
  check_size("weight", weight, {q.items});
  Tensor loss = torch::stable::new_zeros(input, {});
  Tensor grad_input = torch::stable::new_zeros(input, {with_input ? input.size(0) : 0, q.width});
  Tensor grad_weight =
      torch::stable::new_zeros(linear_weight, {with_weight ? q.items : 0, q.width});
  Tensor grad_bias =
      torch::stable::new_zeros(linear_weight, {with_weight && linear_bias ? q.items : 0});

  std::vector<T> grad_row(q.rows, T(1));
  double total = 0;
  const T* class_weight = data_or_null<T>(weight);
  for (int64_t i = 0; i < q.rows; ++i) {
    if (weight) grad_row[i] = class_weight[q.target[i]];
    total += grad_row[i];
  }
  if (mean && total != 0)
    for (T& value : grad_row) value = static_cast<T>(value / total);

  std::vector<double> losses(q.rows);
  Buffer<T> grad_x(with_input ? q.rows * q.ld : 0);
  T* gx = with_input ? static_cast<T*>(grad_x) : nullptr;
  stored_chunks(q, grad_row.data(), losses.data(), gx,
                with_weight ? data<T>(grad_weight) : nullptr,
                with_weight && linear_bias ? data<T>(grad_bias) : nullptr);
  double sum = 0;
  T* input_out = data<T>(grad_input);
  for (int64_t i = 0; i < q.rows; ++i) {
    sum += losses[i] * grad_row[i];
    if (gx) std::copy_n(gx + i * q.ld, q.width, input_out + scored.row[i] * q.width);
  }
  *data<T>(loss) = static_cast<T>(sum);
  return {loss, grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd(Tensor input, Tensor linear_weight,
                                                            std::optional<Tensor> linear_bias,
                                                            Tensor target, bool with_offset) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, linear_weight, linear_bias, target, with_offset);
}

std::tuple<Tensor, Tensor> linear_cross_entropy_bwd(Tensor input, Tensor linear_weight,
                                                    std::optional<Tensor> linear_bias,
                                                    Tensor target, Tensor lse, Tensor grad_lse,
                                                    Tensor grad_target_logit) {
  auto* typed = input.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit);
}

void linear_cross_entropy_update_(
    Tensor linear_weight, std::optional<Tensor> linear_bias, Tensor input, Tensor target,
    Tensor lse, Tensor grad_lse, Tensor grad_target_logit, Tensor rows, Tensor grad_rows,
    std::optional<Tensor> weight_square, std::optional<Tensor> weight_mean,
    std::optional<Tensor> bias_square, std::optional<Tensor> bias_mean, double rate,
    double bias_rate, double eps, double first, double second) {
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    RowUpdate<T> update{};
    update.square = data_or_null<T>(weight_square), update.mean = data_or_null<T>(weight_mean);
    update.bias_square = data_or_null<T>(bias_square);
    update.bias_mean = data_or_null<T>(bias_mean);
    update.rate = T(rate), update.bias_rate = T(bias_rate);
    update.how = {T(eps), T(first), T(second)};
    update_typed<T>(linear_weight, linear_bias, input, target, lse, grad_lse, grad_target_logit,
                    rows, grad_rows, update);
  };
  input.scalar_type() == ScalarType::Double ? typed(0.0) : typed(0.0f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_value_and_grad(
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias, Tensor target,
    std::optional<Tensor> weight, int64_t ignore_index, bool mean, bool with_input,
    bool with_weight) {
  auto* typed = input.scalar_type() == ScalarType::Double ? value_and_grad_typed<double>
                                                          : value_and_grad_typed<float>;
  return typed(input, linear_weight, linear_bias, target, weight, ignore_index, mean, with_input,
               with_weight);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastrec::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&fastrec::linear_cross_entropy_bwd));
  m.impl("linear_cross_entropy_update_", TORCH_BOX(&fastrec::linear_cross_entropy_update_));
  m.impl("linear_cross_entropy_value_and_grad",
         TORCH_BOX(&fastrec::linear_cross_entropy_value_and_grad));
}
