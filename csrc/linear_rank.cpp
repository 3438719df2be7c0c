// SPDX-License-Identifier: Apache-2.0
// CPU kernel of fastrec::linear_rank_fwd: dtypes, tasks and threads.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "linear_rank.h"

#include <numeric>

#include "linear_scores_arguments.h"

namespace fastrec {
namespace {

template <class T>
Tensor forward_typed(const Tensor& input, const Tensor& linear_weight,
                     const std::optional<Tensor>& linear_bias, const Tensor& target,
                     const std::optional<Tensor>& exclude_values,
                     const std::optional<Tensor>& exclude_offsets) {
  Tensor ids = torch::stable::contiguous(target);
  const int64_t* y = int64_data(ids);
  int64_t rows = input.size(0), items = linear_weight.size(0);
  check_size("target", target, {rows});
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(y[i] >= 0 && y[i] < items, "target ", y[i], " is outside [0, ", items, ")");
  std::vector<int64_t> order(rows), sorted(rows);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return y[i] < y[j]; });
  for (int64_t i = 0; i < rows; ++i) sorted[i] = y[order[i]];

  Ranked<T> ranked(input, linear_weight, linear_bias, exclude_values, exclude_offsets, order);
  ranked.split(64, SWEEP);
  int64_t ranges = ranked.scores.ranges;
  std::vector<int64_t> ahead(ranges * rows);
  LinearRank<T> a{ranked.scores, sorted.data(), ahead.data(), nullptr};
  run(a, ranked.scores.blocks * ranges, linear_rank<T>);
  Tensor out = torch::stable::new_empty(input, {rows}, ScalarType::Long);
  int64_t* rank = data<int64_t>(out);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t& at = rank[order[i]] = 1;
    for (int64_t r = 0; r < ranges; ++r) at += ahead[r * rows + i];
    if (ahead[i] < 0) at = items;  // NaN in one range is NaN in all
  }
  return out;
}

Tensor linear_rank_fwd(Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias,
                       Tensor target, std::optional<Tensor> exclude_values,
                       std::optional<Tensor> exclude_offsets) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, linear_weight, linear_bias, target, exclude_values, exclude_offsets);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("linear_rank_fwd", TORCH_BOX(&fastrec::linear_rank_fwd));
}
