// SPDX-License-Identifier: Apache-2.0
// Tensors of an in-batch op -> Pairs. Included by .cpp files, after TORCH_TARGET_VERSION.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "in_batch_pairs.h"
#include "scored.h"

namespace fastrec {
namespace {

// The tensors behind Pairs, without the rows that have no positive where a positive is asked for.
template <class T>
class Batch {
 public:
  using Id = typename Pairs<T>::Id;

  Batch(const Tensor& query, const Tensor& candidate, const std::optional<Tensor>& bias,
        const std::optional<Tensor>& positive, const std::optional<Tensor>& query_group,
        const std::optional<Tensor>& candidate_group, const std::optional<Tensor>& exclude_values,
        const std::optional<Tensor>& exclude_offsets)
      : candidate_(candidate) {
    int64_t items = candidate.size(0), width = candidate.size(1), ld = padded<T>(width);
    check_size("query", query, {query.size(0), width});
    check_size("bias", bias, {items}), check_size("positive", positive, {query.size(0)});
    Tensor y = positive ? torch::stable::contiguous(*positive) : candidate;
    const int64_t rows = query.size(0), *chosen = positive ? int64_data(y) : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      int64_t item = positive ? chosen[i] : -1;
      STD_TORCH_CHECK(item < items, "positive ", item, " is outside [0, ", items, ")");
      if (positive && item < 0) continue;
      row.push_back(i);
      item_.push_back(item);
    }
    int64_t count = static_cast<int64_t>(row.size());
    x_ = std::make_unique<Buffer<T>>((count + AFTER) * ld);
    load_rows<T>(Matrix(query).rows, count, row.data(), width, ld, *x_);
    pairs = {};
    pairs.rows = count, pairs.items = items, pairs.width = width, pairs.ld = ld;
    pairs.x = *x_;
    pairs.candidate = candidate_.rows;
    pairs.positive = item_.data();
    if (bias) {
      bias_ = torch::stable::contiguous(*bias);
      pairs.bias = data<T>(*bias_);
    }
    if (query_group) {
      check_size("query_group", query_group, {rows, query_group->size(1)});
      check_size("candidate_group", candidate_group, {items, query_group->size(1)});
      load_groups(*query_group, *candidate_group);
    }
    if (exclude_values) {
      check_size("exclude_offsets", exclude_offsets, {rows + 1});
      load_lists(*exclude_values, *exclude_offsets);
    }
  }

  Pairs<T> pairs;
  std::vector<int64_t> row;  // [N]: the row of the query tensor

 private:
  // Ids that do not fit are replaced by their rank among the ids of the candidates.
  void load_groups(const Tensor& query_group, const Tensor& candidate_group) {
    Tensor of_rows = torch::stable::contiguous(query_group);
    Tensor of_items = torch::stable::contiguous(candidate_group);
    const int64_t* rows = int64_data(of_rows);
    const int64_t* items = int64_data(of_items);
    int64_t columns = of_items.size(1), count = pairs.rows, all = pairs.items;
    row_group_.resize(columns * count);
    item_group_.resize(columns * all);
    for (int64_t g = 0; g < columns; ++g) {
      std::vector<int64_t> known;
      auto wide = [&](int64_t id) { return id > std::numeric_limits<Id>::max(); };
      bool ranked = false;
      for (int64_t i = 0; i < count; ++i) ranked |= wide(rows[row[i] * columns + g]);
      for (int64_t j = 0; j < all; ++j) ranked |= wide(items[j * columns + g]);
      if (ranked) {
        for (int64_t j = 0; j < all; ++j) known.push_back(items[j * columns + g]);
        std::sort(known.begin(), known.end());
        known.erase(std::unique(known.begin(), known.end()), known.end());
      }
      auto narrow = [&](int64_t id, Id none) -> Id {
        if (id < 0) return none;
        if (!ranked) return static_cast<Id>(id);
        auto at = std::lower_bound(known.begin(), known.end(), id);
        return at != known.end() && *at == id ? static_cast<Id>(at - known.begin()) : none;
      };
      for (int64_t i = 0; i < count; ++i)
        row_group_[g * count + i] = narrow(rows[row[i] * columns + g], -1);
      for (int64_t j = 0; j < all; ++j)
        item_group_[g * all + j] = narrow(items[j * columns + g], -2);
    }
    pairs.columns = columns;
    pairs.row_group = row_group_.data();
    pairs.item_group = item_group_.data();
  }

  void load_lists(const Tensor& values, const Tensor& offsets) {
    values_ = torch::stable::contiguous(values);
    Tensor bounds = torch::stable::contiguous(offsets);
    const int64_t* bound = int64_data(bounds);
    check_offsets(bound, bounds.size(0) - 1, values.size(0));
    for (int64_t i : row) {
      list_begin_.push_back(bound[i]);
      list_end_.push_back(bound[i + 1]);
    }
    pairs.listed = int64_data(values_);
    pairs.list_begin = list_begin_.data();
    pairs.list_end = list_end_.data();
    if (values_->size(0) == 0) pairs.listed = nullptr;
  }

  Matrix candidate_;
  std::optional<Tensor> bias_, values_;
  std::unique_ptr<Buffer<T>> x_;
  std::vector<int64_t> item_, list_begin_, list_end_;
  std::vector<Id> row_group_, item_group_;
};

// Splits a sweep into row blocks x ranges of candidates. Depends on shapes only, never on the
// number of threads: the ranges decide the order of the additions.
template <class Args>
void plan(Args& a) {
  const auto& q = a.pairs;
  int64_t blocks = std::max<int64_t>(1, divide_up(q.rows, BLOCK));
  a.block = round_up(divide_up(q.rows, blocks), 12);  // equal blocks, whole register tiles
  a.blocks = a.block ? divide_up(q.rows, a.block) : 0;
  if (!a.blocks || !q.items) return;
  // Balance on many cores. A task below 2^19 multiply-adds does not pay for its start.
  double work = double(q.rows) * double(q.items) * double(q.width);
  int64_t ranges = std::min<int64_t>(64 / a.blocks, int64_t(std::min(work / (1 << 19), 1e6)));
  ranges = std::max<int64_t>(1, std::min(ranges, divide_up(q.items, TILE)));
  a.range = round_up(divide_up(q.items, ranges), TILE);
  a.ranges = divide_up(q.items, a.range);
}

}  // namespace
}  // namespace fastrec
