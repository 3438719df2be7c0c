// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::multilabel_bce_fwd, _sum and _bwd: tensors, tasks and threads. The
// arithmetic is in multilabel_bce.h, the products in gemm.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "multilabel_bce.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "scored.h"

namespace fastrec {
namespace {

constexpr int64_t MOST_SUMS = 1 << 24;  // numbers of the gradients that tasks of forward add up

// The tensors of a call, without the rows that are not scored.
template <class T>
struct Multilabel {
  Multilabel(const Tensor& input, const Tensor& linear_weight,
             const std::optional<Tensor>& linear_bias, const Tensor& label_values,
             const Tensor& label_offsets, const Tensor& label_rows)
      : weight(linear_weight), values(torch::stable::contiguous(label_values)) {
    const Tensor offsets = torch::stable::contiguous(label_offsets);
    const Tensor rows = torch::stable::contiguous(label_rows);
    const int64_t *bound = int64_data(offsets), *list = int64_data(rows);
    const int64_t labels = linear_weight.size(0), width = linear_weight.size(1);
    const int64_t lists = offsets.size(0) - 1;
    check_offsets(bound, lists, values.size(0));
    check_size("input", input, {input.size(0), width});
    check_size("label_rows", rows, {input.size(0)});
    check_size("linear_bias", linear_bias, {labels});
    const int64_t* label = int64_data(values);
    for (int64_t l = 0; l < lists; ++l) {
      int64_t before = -1;
      for (int64_t k = bound[l]; k < bound[l + 1]; before = label[k++])
        STD_TORCH_CHECK(label[k] > before && label[k] < labels, "label_values must rise from 0 to ",
                        labels - 1, " within a list, got ", before, ", ", label[k]);
    }
    for (int64_t i = 0; i < input.size(0); ++i) {
      if (list[i] == -1) continue;
      STD_TORCH_CHECK(list[i] >= 0 && list[i] < lists, "label_rows ", list[i], " is outside [0, ",
                      lists, ")");
      row.push_back(i);
      begin.push_back(bound[list[i]]);
      end.push_back(bound[list[i] + 1]);
    }
    const int64_t count = static_cast<int64_t>(row.size()), ld = padded<T>(width);
    x = std::make_unique<Buffer<T>>((count + AFTER) * ld);
    load_rows<T>(Matrix(input).rows, count, row.data(), width, ld, *x);
    if (linear_bias)
      bias = torch::stable::contiguous(torch::stable::to(*linear_bias, compute_dtype<T>()));
    args.rows = count, args.labels = labels, args.width = width, args.ld = ld;
    args.x = *x, args.weight = weight.rows;
    args.bias = bias ? data<T>(*bias) : nullptr;
    args.listed = label, args.list_begin = begin.data(), args.list_end = end.data();
  }

  Matrix weight;
  Tensor values;
  std::optional<Tensor> bias;
  std::vector<int64_t> row, begin, end;
  std::unique_ptr<Buffer<T>> x;
  MultilabelArgs<T> args{};
};

// Equal blocks of whole panels. Few rows or labels: more tasks to share. Depends on sizes alone, never on
// the number of threads.
template <class T>
void set_blocks(MultilabelArgs<T>& a, int64_t count) {
  const int64_t most = count < 8 * BLOCK ? 32 : BLOCK;
  a.block = round_up(divide_up(count, std::max<int64_t>(1, divide_up(count, most))), 32);
  a.blocks = count ? divide_up(count, a.block) : 0;
}

// Sums of the gradients of the labels that the tasks of forward left, in order.
template <class T>
void add_tasks(const MultilabelArgs<T>& a, T* grad_weight, T* grad_bias) {
  parallel_for(0, a.labels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* total = grad_weight + i * a.width;
      for (int64_t t = 0; t < a.tasks; ++t) {
        const T* part = a.sum_weight + t * a.sum_size + i * a.ld;
        for (int64_t d = 0; d < a.width; ++d) total[d] += part[d];
      }
      double bias = 0;
      for (int64_t t = 0; a.sum_bias && t < a.tasks; ++t) bias += a.sum_bias[t * a.labels + i];
      if (a.sum_bias) grad_bias[i] = static_cast<T>(bias);
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_typed(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
    const Tensor& label_values, const Tensor& label_offsets, const Tensor& label_rows,
    bool with_input, bool with_weight) {
  Multilabel<T> q(input, linear_weight, linear_bias, label_values, label_offsets, label_rows);
  MultilabelArgs<T>& a = q.args;
  const int64_t rows = input.size(0), kept = with_input ? rows : 0;
  const ScalarType dtype = compute_dtype<T>();
  Tensor loss = torch::stable::new_zeros(input, {rows}, dtype);
  Tensor grad_input = torch::stable::new_zeros(input, {kept, a.width}, dtype);
  const int64_t labels = with_weight ? a.labels : 0, biases = linear_bias ? labels : 0;
  Tensor grad_weight = torch::stable::new_zeros(input, {labels, a.width}, dtype);
  Tensor grad_bias = torch::stable::new_zeros(input, {biases}, dtype);
  const bool all = a.rows == rows;  // then the kernel writes where the result is
  Buffer<double> losses(a.rows);
  Buffer<T> grad(with_input && !all ? a.rows * a.width : 0);
  a.loss = losses;
  if (with_input) a.grad_x = all ? data<T>(grad_input) : static_cast<T*>(grad);
  set_blocks(a, a.rows);
  // A task has sums of its own: few tasks where there are many labels.
  a.sum_size = (a.labels + AFTER) * a.ld;
  const int64_t most = with_weight ? std::clamp<int64_t>(MOST_SUMS / a.sum_size, 1, 32) : a.blocks;
  a.per_task = a.blocks ? divide_up(a.blocks, most) : 1;
  a.tasks = divide_up(a.blocks, a.per_task);
  std::vector<T> sums(with_weight ? a.tasks * a.sum_size : 0);
  std::vector<double> bias_sums(a.tasks * biases);
  if (with_weight) a.sum_weight = sums.data();
  if (biases) a.sum_bias = bias_sums.data();
  run(a, a.tasks, multilabel_forward<T>);
  if (with_weight) add_tasks(a, data<T>(grad_weight), data<T>(grad_bias));
  T *loss_out = data<T>(loss), *input_out = data<T>(grad_input);
  for (int64_t i = 0; i < a.rows; ++i) {
    loss_out[q.row[i]] = static_cast<T>(a.loss[i]);
    if (with_input && !all)
      std::copy_n(a.grad_x + i * a.width, a.width, input_out + q.row[i] * a.width);
  }
  return {loss, grad_input, grad_weight, grad_bias};
}

template <class T>
std::tuple<Tensor, Tensor> backward_typed(const Tensor& input, const Tensor& linear_weight,
                                          const std::optional<Tensor>& linear_bias,
                                          const Tensor& label_values, const Tensor& label_offsets,
                                          const Tensor& label_rows, const Tensor& grad_loss) {
  Multilabel<T> q(input, linear_weight, linear_bias, label_values, label_offsets, label_rows);
  MultilabelArgs<T>& a = q.args;
  Tensor grad_weight = torch::stable::new_empty(linear_weight, {a.labels, a.width});
  Tensor grad_bias = torch::stable::new_empty(linear_bias ? *linear_bias : grad_loss,
                                              {linear_bias ? a.labels : 0});
  const Vector<T> upstream(grad_loss, input.size(0));
  std::vector<T> row_grad;
  for (int64_t i : q.row) row_grad.push_back(static_cast<const T*>(upstream)[i]);
  a.grad_loss = row_grad.data();
  set_blocks(a, a.labels);
  // Few labels are few tasks: rows in ranges as well, whose sums are added in order.
  const int64_t most = std::max<int64_t>(1, a.rows / (8 * TILE));
  const int64_t ranges = std::clamp<int64_t>(divide_up(32, std::max<int64_t>(1, a.blocks)), 1, most);
  a.range = std::max(TILE, round_up(divide_up(a.rows, ranges), TILE));
  a.ranges = std::max<int64_t>(1, divide_up(a.rows, a.range));
  const bool direct = a.ranges == 1 && grad_weight.scalar_type() == compute_dtype<T>();
  Buffer<T> sums(direct ? 0 : a.ranges * a.labels * a.width);
  Buffer<double> bias_sums(a.ranges * a.labels);
  a.grad_weight = direct ? data<T>(grad_weight) : static_cast<T*>(sums);
  a.grad_bias = bias_sums;
  run(a, a.blocks * a.ranges, multilabel_backward<T>);

  const int64_t size = a.labels * a.width;
  parallel_for(0, direct ? 0 : a.labels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* total = a.grad_weight + i * a.width;
      for (int64_t r = 1; r < a.ranges; ++r) {
        const T* part = total + r * size;
        for (int64_t d = 0; d < a.width; ++d) total[d] += part[d];
      }
      store_row<T>(total, grad_weight.data_ptr(), grad_weight.scalar_type(), i * a.width, a.width);
    }
  });
  for (int64_t i = 0; linear_bias && i < a.labels; ++i) {
    double total = 0;
    for (int64_t r = 0; r < a.ranges; ++r) total += a.grad_bias[r * a.labels + i];
    store_row<double>(&total, grad_bias.data_ptr(), grad_bias.scalar_type(), i, 1);
  }
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multilabel_bce_sum(
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias, Tensor label_values,
    Tensor label_offsets, Tensor label_rows, bool with_input) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, linear_weight, linear_bias, label_values, label_offsets, label_rows,
               with_input, true);
}

std::tuple<Tensor, Tensor> multilabel_bce_fwd(Tensor input, Tensor linear_weight,
                                              std::optional<Tensor> linear_bias,
                                              Tensor label_values, Tensor label_offsets,
                                              Tensor label_rows, bool with_input) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  auto [loss, grad_input, grad_weight, grad_bias] = typed(
      input, linear_weight, linear_bias, label_values, label_offsets, label_rows, with_input, false);
  return {loss, grad_input};
}

std::tuple<Tensor, Tensor> multilabel_bce_bwd(Tensor input, Tensor linear_weight,
                                              std::optional<Tensor> linear_bias,
                                              Tensor label_values, Tensor label_offsets,
                                              Tensor label_rows, Tensor grad_loss) {
  auto* typed = input.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(input, linear_weight, linear_bias, label_values, label_offsets, label_rows,
               grad_loss);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("multilabel_bce_fwd", TORCH_BOX(&fastrec::multilabel_bce_fwd));
  m.impl("multilabel_bce_sum", TORCH_BOX(&fastrec::multilabel_bce_sum));
  m.impl("multilabel_bce_bwd", TORCH_BOX(&fastrec::multilabel_bce_bwd));
}
