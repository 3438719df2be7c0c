// SPDX-License-Identifier: Apache-2.0
// Tensors of a ranking op -> Scores. Included by .cpp files, after TORCH_TARGET_VERSION.
#pragma once

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <vector>

#include "linear_scores.h"
#include "scored.h"

namespace fastrec {
namespace {

// The tensors behind Scores. `order`: the row of `input` for every row of the sweep.
template <class T>
class Ranked {
 public:
  Ranked(const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
         const std::optional<Tensor>& exclude_values, const std::optional<Tensor>& exclude_offsets,
         const std::vector<int64_t>& order)
      : weight_(linear_weight) {
    scores = {};
    scores.rows = input.size(0), scores.items = linear_weight.size(0);
    scores.width = linear_weight.size(1);
    scores.ld = padded<T>(scores.width);
    check_size("input", input, {scores.rows, scores.width});
    check_size("linear_bias", linear_bias, {scores.items});
    x_ = std::make_unique<Buffer<T>>((scores.rows + AFTER) * scores.ld);
    load_rows<T>(Matrix(input).rows, scores.rows, order.data(), scores.width, scores.ld, *x_);
    scores.x = *x_;
    scores.weight = weight_.rows;
    if (linear_bias) {
      bias_ = torch::stable::contiguous(torch::stable::to(*linear_bias, compute_dtype<T>()));
      scores.bias = data<T>(*bias_);
    }
    if (exclude_values && exclude_values->size(0) > 0) {
      values_ = torch::stable::contiguous(*exclude_values);
      Tensor offsets = torch::stable::contiguous(*exclude_offsets);
      const int64_t* bound = int64_data(offsets);
      check_size("exclude_offsets", offsets, {scores.rows + 1});
      check_offsets(bound, scores.rows, values_->size(0));
      for (int64_t i : order) {
        list_begin_.push_back(bound[i]);
        list_end_.push_back(bound[i + 1]);
      }
      scores.listed = int64_data(values_);
      scores.list_begin = list_begin_.data();
      scores.list_end = list_end_.data();
    }
  }

  // Splits the sweep into row blocks x ranges of at least `smallest` items, about `tasks` in all.
  // Depends on shapes only, never on the number of threads.
  void split(int64_t tasks, int64_t smallest) {
    Scores<T>& q = scores;
    int64_t blocks = std::max<int64_t>(1, divide_up(q.rows, BLOCK));
    q.block = round_up(divide_up(q.rows, blocks), 32);  // equal blocks of whole panels
    q.blocks = q.block ? divide_up(q.rows, q.block) : 0;
    if (!q.blocks) return;
    // A task below 2^19 multiply-adds (about 10 us) does not pay for its start.
    double work = double(q.rows) * double(q.items) * double(q.width);
    int64_t ranges = std::min<int64_t>(divide_up(tasks, q.blocks),
                                       int64_t(std::min(work / (1 << 19), 1e6)) / q.blocks);
    ranges = std::max<int64_t>(1, std::min(ranges, q.items / smallest));
    // Counts and positions inside a range are 32 bits wide.
    ranges = std::max(ranges, q.items >> 30);
    q.range = round_up(std::max<int64_t>(1, divide_up(q.items, ranges)), SWEEP);
    q.ranges = divide_up(q.items, q.range);
  }

  Scores<T> scores;

 private:
  Matrix weight_;
  std::optional<Tensor> bias_, values_;
  std::unique_ptr<Buffer<T>> x_;
  std::vector<int64_t> list_begin_, list_end_;
};

}  // namespace
}  // namespace fastrec
