// The tensors of a linear_cross_entropy problem as pointers, and workers that share its tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "linear_cross_entropy.h"

namespace fastrec {
namespace {

using torch::stable::Tensor;

// Workers draw tasks from a counter: tasks own their outputs, so the order does not matter, and a
// worker that is slowed down by other processes takes fewer.
template <class Args>
void run(Args& args, int64_t tasks, void (*worker)(const Args&)) {
  std::atomic<int64_t> next{0};
  args.next = &next;
  int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(args); });
}

Tensor with_contiguous_rows(const Tensor& matrix) {
  bool rows_are = matrix.stride(1) == 1 || matrix.size(1) == 1;
  return rows_are ? matrix : torch::stable::contiguous(matrix);
}

Rows rows_of(const Tensor& matrix) {
  return {static_cast<const char*>(matrix.data_ptr()),
          matrix.stride(0) * static_cast<int64_t>(matrix.element_size()), matrix.scalar_type()};
}

// The tensors of a problem, without the rows that are not scored.
template <class T>
struct Scored {
  Scored(const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
         const Tensor& target, int64_t ignore_index = -1)
      : weight(with_contiguous_rows(linear_weight)) {
    Tensor ids = torch::stable::contiguous(target);
    const int64_t* y = static_cast<const int64_t*>(ids.data_ptr());
    int64_t items = weight.size(0), width = weight.size(1);
    for (int64_t i = 0; i < input.size(0); ++i) {
      if (y[i] < 0 || y[i] == ignore_index) continue;
      STD_TORCH_CHECK(y[i] < items, "target ", y[i], " is outside [0, ", items, ")");
      row.push_back(i);
      item.push_back(y[i]);
    }
    int64_t count = static_cast<int64_t>(row.size()), ld = padded<T>(width);
    constexpr int64_t after = 12;  // the kernels read whole register tiles, at most 12 rows
    x = std::make_unique<Buffer<T>>((count + after) * ld);
    Tensor source = with_contiguous_rows(input);
    Rows rows = rows_of(source);
    torch::stable::parallel_for(0, count + after, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::fill_n(*x + i * ld, ld, T(0));
        if (i < count) rows.load(row[i], *x + i * ld, width);
      }
    });
    if (linear_bias)
      bias = torch::stable::contiguous(torch::stable::to(*linear_bias, compute_dtype<T>()));
    problem = {count, items, width, ld, *x, item.data(), rows_of(weight),
               bias ? static_cast<const T*>(bias->data_ptr()) : nullptr,
               input.scalar_type() == ScalarType::BFloat16 && has_bf16()};
  }

  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> row, item;
  std::unique_ptr<Buffer<T>> x;
  Problem<T> problem;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastrec
