// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::jagged_attention_fwd and _bwd: strides, dtypes, tasks and threads.
// The arithmetic is in jagged_attention.h, the products in small_gemm.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "jagged_attention.h"
#include "parallel.h"

namespace fastrec {
namespace {

Tensor with_contiguous_features(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

Heads heads_of(const Tensor& x) {
  bytes_of(x.scalar_type());
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.scalar_type()};
}

// One of the three matrices of a packed [T, 3, H, D] tensor.
Heads heads_of(const Tensor& packed, int64_t index) {
  auto* data = static_cast<char*>(packed.data_ptr());
  return {data + index * packed.stride(1) * static_cast<int64_t>(packed.element_size()),
          packed.stride(0), packed.stride(2), packed.scalar_type()};
}

// The arguments that forward and backward share, and the tensors that hold them.
template <class T>
struct Problem {
  Problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets,
          bool causal, double scale, const std::optional<Tensor>& keys,
          const std::optional<Tensor>& rng, int64_t drop, int64_t site, int64_t layer)
      : q(with_contiguous_features(query)),
        k(with_contiguous_features(key)),
        v(with_contiguous_features(value)),
        bounds(torch::stable::contiguous(offsets)),
        args{query.size(1), query.size(2), 0,
             data<int64_t>(bounds), nullptr,
             PhiloxKey(0, 0, Site::attention, 0), static_cast<int>(drop), causal,
             static_cast<T>(scale), heads_of(q), heads_of(k), heads_of(v),
             {}, {}, {}, {}, {}, nullptr, nullptr, nullptr, nullptr, 0, nullptr} {
    sequences = offsets.size(0) - 1;
    const std::initializer_list<int64_t> sizes{query.size(0), query.size(1), query.size(2)};
    check_size("key", key, sizes), check_size("value", value, sizes);
    if (drop > 0) {
      STD_TORCH_CHECK(rng && keys, "dropout needs rng and keys");
      check_size("rng", *rng, {2});
      Tensor state = torch::stable::contiguous(*rng);
      const int64_t* words = data<int64_t>(state);
      args.key = PhiloxKey(words[0], words[1], static_cast<Site>(site), layer);
      sequence_keys = torch::stable::contiguous(*keys);
      check_size("keys", *sequence_keys, {sequences});
      args.sequence_keys = data<int64_t>(*sequence_keys);
    }
    const int64_t* at = args.offsets;
    check_offsets(at, sequences, query.size(0));
    for (int64_t b = 0; b < sequences; ++b)
      args.longest = std::max(args.longest, at[b + 1] - at[b]);
  }

  // Longest first, by counting: neighbours of one length take the same branches, which are a third
  // of the time otherwise, and the costly tasks start first.
  void sort() {
    const int64_t* at = args.offsets;
    std::vector<int64_t> start(args.longest + 2, 0);
    for (int64_t b = 0; b < sequences; ++b) ++start[args.longest - (at[b + 1] - at[b]) + 1];
    for (int64_t i = 0; i <= args.longest; ++i) start[i + 1] += start[i];
    order.resize(sequences);
    for (int64_t b = 0; b < sequences; ++b) order[start[args.longest - (at[b + 1] - at[b])]++] = b;
  }

  // Tasks of about equal cost, the heads of long sequences apart. A (sequence, head) has the same
  // result in any task.
  void plan() {
    const int64_t* at = args.offsets;
    auto cost = [&](int64_t i) {  // of a head: products, and the rest per event and per sequence
      int64_t length = at[order[i] + 1] - at[order[i]];
      return double(length * (length + 16) + 64);
    };
    double total = 0, heads = double(args.heads);
    for (int64_t i = 0; i < sequences; ++i) total += cost(i) * heads;
    // 16 tasks a worker even out the end; below 2^13 (about 20 us) a task does not pay.
    double target = std::max(total / (16.0 * torch::stable::get_num_threads()), 8192.0);
    for (int64_t i = 0; i < sequences;) {
      if (cost(i) * heads >= target) {
        for (int64_t h = 0; h < args.heads; ++h) tasks.push_back({i, i + 1, h, h + 1});
        ++i;
        continue;
      }
      Task task{i, i, 0, args.heads};
      for (double sum = 0; task.last < sequences && sum < target; ++task.last)
        sum += cost(task.last) * heads;
      i = task.last;
      tasks.push_back(task);
    }
  }

  // The rows of a contiguous result that belong to no sequence.
  void zero_rest(const Tensor& out) const {
    const int64_t bytes = out.stride(0) * static_cast<int64_t>(out.element_size());
    const int64_t used = args.offsets[sequences];
    std::memset(static_cast<char*>(out.data_ptr()) + used * bytes, 0,
                (out.size(0) - used) * bytes);
  }

  void run(void (*worker)(const AttentionArgs<T>&)) {
    sort();
    plan();
    std::atomic<int64_t> next{0};
    args.next = &next, args.order = order.data(), args.tasks = tasks.data();
    args.task_count = static_cast<int64_t>(tasks.size());
    int64_t workers = std::min<int64_t>(args.task_count, torch::stable::get_num_threads());
    parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(args); });
  }

  Tensor q, k, v, bounds;
  std::optional<Tensor> sequence_keys;
  int64_t sequences;
  std::vector<int64_t> order;
  std::vector<Task> tasks;
  AttentionArgs<T> args;
};

template <class T>
std::tuple<Tensor, Tensor> forward_typed(Problem<T>&& problem, const Tensor& query) {
  constexpr ScalarType accumulate = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  int64_t events = query.size(0), heads = query.size(1);
  Tensor out = torch::stable::new_empty(query, {events, heads, query.size(2)});
  Tensor lse = torch::stable::new_empty(query, {2, events, heads}, accumulate);
  problem.args.out = heads_of(out);
  problem.args.lse = data<T>(lse), problem.args.left_out = data<T>(lse) + events * heads;
  problem.zero_rest(out);
  problem.run(attention_forward<T>);
  return {out, lse};
}

template <class T>
Tensor backward_typed(Problem<T>&& problem, const Tensor& grad_out, const Tensor& query,
                      const std::optional<Tensor>& out, const Tensor& lse) {
  check_size("grad_out", grad_out, {query.size(0), query.size(1), query.size(2)});
  check_size("out", out, {query.size(0), query.size(1), query.size(2)});
  check_size("lse", lse, {2, query.size(0), query.size(1)});
  Tensor upstream = with_contiguous_features(grad_out), saved = torch::stable::contiguous(lse);
  Tensor grad = torch::stable::new_empty(query, {query.size(0), 3, query.size(1), query.size(2)});
  std::optional<Tensor> output;
  if (problem.args.longest > KEYS) {
    STD_TORCH_CHECK(out, "a sequence of more than ", KEYS, " events needs out");
    output = with_contiguous_features(*out);
    problem.args.out = heads_of(*output);
  }
  problem.args.grad_out = heads_of(upstream);
  problem.args.grad_query = heads_of(grad, 0);
  problem.args.grad_key = heads_of(grad, 1);
  problem.args.grad_value = heads_of(grad, 2);
  problem.args.lse = data<T>(saved);
  problem.args.left_out = data<T>(saved) + query.size(0) * query.size(1);
  problem.zero_rest(grad);
  problem.run(attention_backward<T>);
  return grad;
}

std::tuple<Tensor, Tensor> jagged_attention_fwd(Tensor query, Tensor key, Tensor value,
                                                Tensor offsets, int64_t max_seq_len, bool causal,
                                                double scale, std::optional<Tensor> keys,
                                                std::optional<Tensor> positions,
                                                std::optional<Tensor> rng, int64_t drop,
                                                int64_t site, int64_t layer) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_typed(
        Problem<T>(query, key, value, offsets, causal, scale, keys, rng, drop, site, layer),
        query);
  };
  return query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

Tensor jagged_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                            std::optional<Tensor> out, Tensor lse, Tensor offsets,
                            int64_t max_seq_len, bool causal, double scale,
                            std::optional<Tensor> keys, std::optional<Tensor> positions,
                            std::optional<Tensor> rng, int64_t drop, int64_t site, int64_t layer) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward_typed(
        Problem<T>(query, key, value, offsets, causal, scale, keys, rng, drop, site, layer),
        grad_out, query, out, lse);
  };
  return query.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("jagged_attention_fwd", TORCH_BOX(&fastrec::jagged_attention_fwd));
  m.impl("jagged_attention_bwd", TORCH_BOX(&fastrec::jagged_attention_bwd));
}
