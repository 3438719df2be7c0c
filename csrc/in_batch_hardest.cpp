// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::in_batch_hardest_fwd and _bwd: dtypes, tasks and threads.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "in_batch_hardest.h"

#include "in_batch_arguments.h"

namespace fastrec {
namespace {

template <class T>
Tensor forward_typed(const Tensor& query, const Tensor& candidate,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& query_group,
                     const std::optional<Tensor>& candidate_group,
                     const std::optional<Tensor>& exclude_values,
                     const std::optional<Tensor>& exclude_offsets) {
  Batch<T> batch(query, candidate, bias, std::nullopt, query_group, candidate_group,
                 exclude_values, exclude_offsets);
  InBatchHardest<T> a{};
  a.pairs = batch.pairs;
  plan(a);
  int64_t rows = a.pairs.rows;
  Buffer<T> best(a.ranges * rows);
  Buffer<typename Pairs<T>::Id> index(a.ranges * rows);
  a.best = best, a.index = index;
  run(a, a.blocks * a.ranges, in_batch_hardest<T>);
  Tensor out = torch::stable::new_empty(query, {rows}, ScalarType::Long);
  int64_t* at = data<int64_t>(out);
  for (int64_t i = 0; i < rows; ++i) {
    T top = OUT<T>;
    at[i] = -1;
    for (int64_t r = 0; r < a.ranges; ++r) {
      if (best[r * rows + i] > top) top = best[r * rows + i], at[i] = index[r * rows + i];
    }
  }
  return out;
}

// Sums the rows of equal index in their order.
template <class T>
Tensor backward_typed(const Tensor& grad, const Tensor& index, int64_t candidates) {
  Tensor source = torch::stable::contiguous(grad), ids = torch::stable::contiguous(index);
  int64_t rows = grad.size(0), width = grad.size(1);
  check_size("index", index, {rows});
  const int64_t* item = int64_data(ids);
  std::vector<int64_t> begin(candidates + 1, 0);
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(item[i] < candidates, "index ", item[i], " is outside [0, ", candidates, ")");
    if (item[i] >= 0) ++begin[item[i] + 1];
  }
  for (int64_t j = 0; j < candidates; ++j) begin[j + 1] += begin[j];
  std::vector<int64_t> row(begin[candidates]), place(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < rows; ++i)
    if (item[i] >= 0) row[place[item[i]]++] = i;
  Tensor out = torch::stable::new_zeros(grad, {candidates, width});
  const T* from = data<T>(source);
  T* to = data<T>(out);
  parallel_for(0, candidates, 256, [&](int64_t first, int64_t last) {
    for (int64_t at = begin[first], j = first; j < last; ++j) {
      for (; at < begin[j + 1]; ++at) {
        for (int64_t d = 0; d < width; ++d) to[j * width + d] += from[row[at] * width + d];
      }
    }
  });
  return out;
}

Tensor in_batch_hardest_fwd(Tensor query, Tensor candidate, std::optional<Tensor> bias,
                            std::optional<Tensor> query_group,
                            std::optional<Tensor> candidate_group,
                            std::optional<Tensor> exclude_values,
                            std::optional<Tensor> exclude_offsets) {
  auto* typed = query.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(query, candidate, bias, query_group, candidate_group, exclude_values,
               exclude_offsets);
}

Tensor in_batch_hardest_bwd(Tensor grad, Tensor index, int64_t candidates) {
  auto* typed = grad.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                         : backward_typed<float>;
  return typed(grad, index, candidates);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("in_batch_hardest_fwd", TORCH_BOX(&fastrec::in_batch_hardest_fwd));
  m.impl("in_batch_hardest_bwd", TORCH_BOX(&fastrec::in_batch_hardest_bwd));
}
