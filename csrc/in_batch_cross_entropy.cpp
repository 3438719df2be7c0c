// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::in_batch_cross_entropy_fwd and _bwd: dtypes, tasks and threads.
// The arithmetic is in in_batch_cross_entropy.h, the exclusions in in_batch_pairs.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "in_batch_cross_entropy.h"

#include <cmath>
#include <tuple>

#include "in_batch_arguments.h"

namespace fastrec {
namespace {

template <class T>
void combine(const InBatchForward<T>& a, int64_t i, T& loss, T& lse, T& left_out, T* direction) {
  const Pairs<T>& q = a.pairs;
  T top = OUT<T>, positive = a.positive_logit[i];
  for (int64_t r = 0; r < a.ranges; ++r) top = std::max(top, a.top[r * q.rows + i]);
  double sum = 0;
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    sum += scale * a.sum[r * q.rows + i];
  }
  const double log_sum = std::log(sum);
  double others = double(top) + log_sum - positive;  // -inf when all are left out
  // lse from the larger of the positive and the others: a sum that begins with a positive of -1e30
  // ends as the rounding of that number, and one with -inf as NaN.
  const bool above = others > 0;
  const double extra = std::log1p(std::exp(-std::fabs(others)));
  const double exact = (above ? others : double(positive) - positive) + extra;  // inf - inf: NaN
  loss = static_cast<T>(exact);
  split_lse(above ? top : positive, above ? log_sum + extra : exact, lse, left_out);
  if (!direction) return;
  double rest = -std::expm1(-exact);  // 1 - p_positive
  std::fill_n(direction, q.width, T(0));
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    T factor = static_cast<T>(sum == 0 ? 0 : rest * scale / sum);
    const T* weighted = a.weighted + (r * q.rows + i) * q.width;
    for (int64_t d = 0; d < q.width; ++d) direction[d] += factor * weighted[d];
  }
  const T* c = reinterpret_cast<const T*>(q.candidate.data + q.positive[i] * q.candidate.stride);
  for (int64_t d = 0; d < q.width; ++d) direction[d] -= static_cast<T>(rest) * c[d];
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_typed(
    const Tensor& query, const Tensor& candidate, const std::optional<Tensor>& bias,
    const Tensor& positive, const std::optional<Tensor>& query_group,
    const std::optional<Tensor>& candidate_group, const std::optional<Tensor>& exclude_values,
    const std::optional<Tensor>& exclude_offsets, bool with_direction) {
  Batch<T> batch(query, candidate, bias, positive, query_group, candidate_group, exclude_values,
                 exclude_offsets);
  const Pairs<T>& q = batch.pairs;
  int64_t rows = query.size(0);
  Tensor loss = torch::stable::new_zeros(query, {rows});
  Tensor lse = torch::stable::new_zeros(query, {2, rows});
  Tensor direction = torch::stable::new_zeros(query, {with_direction ? rows : 0, q.width});

  InBatchForward<T> a{};
  a.pairs = q;
  a.with_direction = with_direction;
  plan(a);
  int64_t partials = a.ranges * q.rows;
  Buffer<T> top(partials), weighted(with_direction ? partials * q.width : 0), logit(q.rows);
  Buffer<double> sum(partials);
  a.top = top, a.sum = sum, a.weighted = weighted, a.positive_logit = logit;
  run(a, a.blocks * a.ranges, in_batch_forward<T>);

  T* loss_out = data<T>(loss);
  T* lse_out = data<T>(lse);
  T* out = data<T>(direction);
  parallel_for(0, q.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = batch.row[i];
      combine(a, i, loss_out[row], lse_out[row], lse_out[rows + row],
              with_direction ? out + row * q.width : nullptr);
    }
  });
  return {loss, lse, direction};
}

// Listed pairs by block of candidates, then by row.
template <class T>
void sort_listed(const Pairs<T>& q, int64_t block, int64_t blocks, std::vector<Excluded>& pairs,
                 std::vector<int64_t>& begin) {
  begin.assign(blocks + 1, 0);
  if (!q.listed) return;
  for (int64_t i = 0; i < q.rows; ++i) {
    for (int64_t at = q.list_begin[i]; at < q.list_end[i]; ++at) ++begin[q.listed[at] / block + 1];
  }
  for (int64_t b = 0; b < blocks; ++b) begin[b + 1] += begin[b];
  pairs.resize(begin[blocks]);
  std::vector<int64_t> place(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < q.rows; ++i) {
    for (int64_t at = q.list_begin[i]; at < q.list_end[i]; ++at)
      pairs[place[q.listed[at] / block]++] = {i, q.listed[at]};
  }
}

template <class T>
std::tuple<Tensor, Tensor> backward_typed(
    const Tensor& query, const Tensor& candidate, const std::optional<Tensor>& bias,
    const Tensor& positive, const std::optional<Tensor>& query_group,
    const std::optional<Tensor>& candidate_group, const std::optional<Tensor>& exclude_values,
    const std::optional<Tensor>& exclude_offsets, const Tensor& loss, const Tensor& lse,
    const Tensor& grad_loss) {
  Batch<T> batch(query, candidate, bias, positive, query_group, candidate_group, exclude_values,
                 exclude_offsets);
  const Pairs<T>& q = batch.pairs;
  Tensor grad_candidate = torch::stable::new_empty(candidate, {q.items, q.width});
  Tensor grad_bias = torch::stable::new_empty(candidate, {bias ? q.items : 0});
  Tensor losses = torch::stable::contiguous(loss), shifts = torch::stable::contiguous(lse);
  Tensor grads = torch::stable::contiguous(grad_loss);
  const int64_t rows = query.size(0);
  check_size("loss", losses, {rows}), check_size("lse", shifts, {2, rows});
  check_size("grad_loss", grads, {rows});
  const T *loss_in = data<T>(losses), *lse_in = data<T>(shifts), *grad_in = data<T>(grads);
  std::vector<T> shift(q.rows), grad(q.rows), grad_positive(q.rows);
  for (int64_t i = 0; i < q.rows; ++i) {
    int64_t row = batch.row[i];
    shift[i] = finite_shift(lse_in[row]);
    const T upstream = grad_in[row];
    grad[i] = upstream * std::exp(-lse_in[rows + row]);
    double rest = -std::expm1(-double(loss_in[row]));
    grad_positive[i] = static_cast<T>(-rest * upstream);
  }

  InBatchBackward<T> a{};
  a.pairs = q;
  a.block = q.items < 64 * BLOCK ? BLOCK / 2 : BLOCK;  // few candidates: more tasks to share
  a.blocks = divide_up(q.items, a.block);
  std::vector<Excluded> excluded;
  std::vector<int64_t> excluded_begin;
  sort_listed(q, a.block, a.blocks, excluded, excluded_begin);
  a.excluded = excluded.data(), a.excluded_begin = excluded_begin.data();
  a.lse = shift.data(), a.grad = grad.data(), a.grad_positive = grad_positive.data();
  a.grad_candidate = data<T>(grad_candidate);
  a.grad_bias = bias ? data<T>(grad_bias) : nullptr;
  run(a, a.blocks, in_batch_backward<T>);
  return {grad_candidate, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> in_batch_cross_entropy_fwd(
    Tensor query, Tensor candidate, std::optional<Tensor> bias, Tensor positive,
    std::optional<Tensor> query_group, std::optional<Tensor> candidate_group,
    std::optional<Tensor> exclude_values, std::optional<Tensor> exclude_offsets,
    bool with_direction) {
  auto* typed = query.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(query, candidate, bias, positive, query_group, candidate_group, exclude_values,
               exclude_offsets, with_direction);
}

std::tuple<Tensor, Tensor> in_batch_cross_entropy_bwd(
    Tensor query, Tensor candidate, std::optional<Tensor> bias, Tensor positive,
    std::optional<Tensor> query_group, std::optional<Tensor> candidate_group,
    std::optional<Tensor> exclude_values, std::optional<Tensor> exclude_offsets, Tensor loss,
    Tensor lse, Tensor grad_loss) {
  auto* typed = query.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(query, candidate, bias, positive, query_group, candidate_group, exclude_values,
               exclude_offsets, loss, lse, grad_loss);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("in_batch_cross_entropy_fwd", TORCH_BOX(&fastrec::in_batch_cross_entropy_fwd));
  m.impl("in_batch_cross_entropy_bwd", TORCH_BOX(&fastrec::in_batch_cross_entropy_bwd));
}
