// SPDX-License-Identifier: Apache-2.0
// CPU kernel of fastrec::linear_topk_fwd: dtypes, tasks and threads.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "linear_topk.h"

#include <numeric>
#include <tuple>

#include "linear_scores_arguments.h"

namespace fastrec {
namespace {

template <class T>
std::tuple<Tensor, Tensor> forward_typed(const Tensor& input, const Tensor& linear_weight,
                                         const std::optional<Tensor>& linear_bias, int64_t k,
                                         const std::optional<Tensor>& exclude_values,
                                         const std::optional<Tensor>& exclude_offsets) {
  int64_t rows = input.size(0);
  STD_TORCH_CHECK(k >= 0, "k must not be negative, got ", k);
  std::vector<int64_t> order(rows);
  std::iota(order.begin(), order.end(), int64_t(0));
  Ranked<T> ranked(input, linear_weight, linear_bias, exclude_values, exclude_offsets, order);
  // The k best of every range are kept until the end: 1/64 of the scores at most.
  ranked.split(64, std::max<int64_t>(1024, 64 * k));
  const Scores<T>& q = ranked.scores;
  Buffer<Candidate<T>> best(q.ranges * rows * k);
  std::vector<int64_t> count(q.ranges * rows);
  std::vector<std::atomic<T>> bound(rows);
  for (auto& value : bound) value = -std::numeric_limits<T>::infinity();
  LinearTopk<T> a{q, k, best, count.data(), bound.data(), nullptr};
  if (k > 0) run(a, q.blocks * q.ranges, linear_topk<T>);

  Tensor values = torch::stable::new_empty(input, {rows, k}, compute_dtype<T>());
  Tensor indices = torch::stable::new_empty(input, {rows, k}, ScalarType::Long);
  T* value = data<T>(values);
  int64_t* index = data<int64_t>(indices);
  parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    std::vector<std::pair<T, int64_t>> all;
    auto better = [](const std::pair<T, int64_t>& x, const std::pair<T, int64_t>& y) {
      return x.first > y.first || (x.first == y.first && x.second < y.second);
    };
    for (int64_t i = first; i < last; ++i) {
      all.clear();
      for (int64_t r = 0; r < q.ranges; ++r) {
        const Candidate<T>* from = best + (r * rows + i) * k;
        for (int64_t c = 0; c < count[r * rows + i]; ++c)
          all.emplace_back(from[c].score, r * q.range + from[c].item);
      }
      int64_t found = std::min<int64_t>(k, all.size());
      if (found < static_cast<int64_t>(all.size()))
        std::nth_element(all.begin(), all.begin() + found, all.end(), better);
      std::sort(all.begin(), all.begin() + found, better);
      for (int64_t c = 0; c < k; ++c) {
        bool here = c < found;
        value[i * k + c] = here ? all[c].first : -std::numeric_limits<T>::infinity();
        index[i * k + c] = here ? all[c].second : -1;
      }
    }
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor> linear_topk_fwd(Tensor input, Tensor linear_weight,
                                           std::optional<Tensor> linear_bias, int64_t k,
                                           std::optional<Tensor> exclude_values,
                                           std::optional<Tensor> exclude_offsets) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, linear_weight, linear_bias, k, exclude_values, exclude_offsets);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("linear_topk_fwd", TORCH_BOX(&fastrec::linear_topk_fwd));
}
