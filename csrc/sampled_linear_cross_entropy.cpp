// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::sampled_linear_cross_entropy_fwd and _bwd: tensors in and out, the sort of
// the pairs by item. The arithmetic is in sampled_linear_cross_entropy*.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "sampled_linear_cross_entropy_own.h"
#include "sampled_linear_cross_entropy_shared.h"
#include "sampled_linear_cross_entropy_sums.h"

#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "arguments.h"

namespace fastrec {
namespace {

// [size] in T, or null.
template <class T>
struct MaybeVector {
  MaybeVector(const std::optional<Tensor>& vector, int64_t size) {
    if (vector) values.emplace(vector, size);
  }
  operator const T*() const { return values ? static_cast<const T*>(*values) : nullptr; }
  std::optional<Vector<T>> values;
};

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t low, int64_t items) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= low && ids[i] < items, name, " ", ids[i], " is outside [0, ", items,
                    ")");
}

// The tensors behind SampledArgs.
template <class T>
struct Sampled {
  Sampled(const Tensor& input, const Tensor& linear_weight,
          const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& log_q,
          const Tensor& target_, const Tensor& negatives_, double beta)
      : target(torch::stable::contiguous(target_)),
        negatives(torch::stable::contiguous(negatives_)),
        source(input),
        weight(linear_weight),
        bias(linear_bias, linear_weight.size(0)),
        correction(log_q, linear_weight.size(0)),
        rows(input.size(0)),
        width(input.size(1)),
        ld(padded<T>(width)),
        own(negatives.dim() == 2),
        K(negatives.size(own ? 1 : 0)),
        x((rows + AFTER) * ld),
        shared(own ? 0 : (K + AFTER) * ld),
        shared_offset(own ? 0 : K) {
    check_size("linear_weight", linear_weight, {linear_weight.size(0), width});
    check_size("target", target, {rows});
    if (own) check_size("negatives", negatives, {rows, K});
    check_ids("target", data<int64_t>(target), rows, -1, linear_weight.size(0));
    check_ids("negative", data<int64_t>(negatives), own ? rows * K : K, 0, linear_weight.size(0));
    load_rows<T>(source.rows, rows, nullptr, width, ld, x);
    // Rows that are not scored stand in the tiles of shared negatives: 0 times a NaN would be one.
    const int64_t* scored = data<int64_t>(target);
    for (int64_t i = 0; i < rows; ++i)
      if (scored[i] < 0) std::fill_n(x + i * ld, ld, T(0));
    args = {};
    args.rows = rows, args.negatives = K, args.width = width, args.ld = ld;
    args.beta = static_cast<T>(beta);
    args.x = x, args.target = data<int64_t>(target), args.drawn = data<int64_t>(negatives);
    args.weight = weight.rows, args.bias = bias, args.log_q = correction;
    if (own) return;
    load_rows<T>(weight.rows, K, args.drawn, width, ld, shared);
    for (int64_t k = 0; k < K; ++k) {
      shared_offset[k] = args.offset(args.drawn[k]);
      sorted.push_back({args.drawn[k], k});
    }
    std::sort(sorted.begin(), sorted.end());
    args.shared = shared, args.shared_offset = shared_offset, args.sorted = sorted.data();
  }

  Tensor target, negatives;
  Matrix source, weight;
  MaybeVector<T> bias, correction;
  int64_t rows, width, ld;
  bool own;
  int64_t K;
  Buffer<T> x, shared, shared_offset;
  std::vector<Hit> sorted;
  SampledArgs<T> args;
};

template <class T>
void each_range(const SampledArgs<T>& all, int64_t count, int64_t grain,
                void (*kernel)(const SampledArgs<T>&)) {
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    SampledArgs<T> mine = all;
    mine.begin = begin, mine.end = end;
    kernel(mine);
  });
}

int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_typed(Sampled<T> sampled,
                                                                 const Tensor& input,
                                                                 bool with_input,
                                                                 bool with_weight) {
  SampledArgs<T>& a = sampled.args;
  auto out = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(input, std::vector<int64_t>(shape), compute_dtype<T>());
  };
  const bool keep = with_weight && sampled.own;
  Tensor loss = out({a.rows}), grad_target = out({a.rows}), lse = out({2, a.rows});
  Tensor grad_input = out({with_input ? a.rows : 0, a.width});
  Tensor grad_negatives = out({keep ? a.rows : 0, a.negatives});
  a.loss = data<T>(loss), a.grad_target = data<T>(grad_target);
  a.lse = data<T>(lse), a.left_out = a.lse + a.rows;
  a.grad_input = with_input ? data<T>(grad_input) : nullptr;
  a.grad_negatives = keep ? data<T>(grad_negatives) : nullptr;
  if (sampled.own)
    each_range(a, a.rows, 16, own_forward<T>);
  else
    each_range(a, blocks_of(a.rows), 1, shared_forward<T>);
  return {loss, grad_input, grad_target, grad_negatives, lse};
}

int bits_of(uint64_t most) {
  int bits = 0;
  while (bits < 64 && most >> bits) ++bits;
  return bits;
}

// Counting sort of keys by their bits from `low` on, `bits` of them; equal ones keep their order.
void sort_keys(std::vector<uint64_t>& key, int low, int bits) {
  const int passes = (bits + 11) / 12;
  std::vector<uint64_t> next(key.size());
  for (int pass = 0, done = 0; pass < passes; ++pass) {
    const int step = (bits - done) / (passes - pass), shift = low + done;
    std::vector<int64_t> place((size_t{1} << step) + 1, 0);
    auto digit = [&](uint64_t k) { return (k >> shift) & ((uint64_t{1} << step) - 1); };
    for (uint64_t k : key) ++place[digit(k) + 1];
    for (size_t bin = 1; bin < place.size(); ++bin) place[bin] += place[bin - 1];
    for (uint64_t k : key) next[place[digit(k)]++] = k;
    key.swap(next);
    done += step;
  }
}

// A gradient of a large table is new memory, whose pages of 4 KiB take longer to get than to fill.
void prefer_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t at = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_typed(Sampled<T> sampled, const Tensor& linear_weight,
                                                  const std::optional<Tensor>& linear_bias,
                                                  const Tensor& grad_target_,
                                                  const Tensor& grad_negatives_, const Tensor& lse_,
                                                  const Tensor& grad_loss_, bool sparse) {
  SampledArgs<T>& a = sampled.args;
  const int64_t N = a.rows, K = a.negatives, items = linear_weight.size(0);
  Tensor grad_target = torch::stable::contiguous(grad_target_);
  Tensor grad_negatives = torch::stable::contiguous(grad_negatives_);
  Tensor lse = torch::stable::contiguous(lse_), grad_loss = torch::stable::contiguous(grad_loss_);
  check_size("grad_target", grad_target, {N}), check_size("grad_loss", grad_loss, {N});
  check_size("lse", lse, {2, N});
  if (sampled.own) check_size("grad_negatives", grad_negatives, {N, K});
  const T *lse_in = data<T>(lse), *grad_in = data<T>(grad_loss);
  Buffer<T> shift(N), upstream(N), through_lse(N), grad_shared(sampled.own ? 0 : K * a.ld);
  Buffer<T> grad_offset(sampled.own ? 0 : K);
  for (int64_t i = 0; i < N; ++i) {
    const bool scored = a.target[i] >= 0;
    shift[i] = scored ? lse_in[i] : std::numeric_limits<T>::infinity();
    upstream[i] = scored ? grad_in[i] : T(0);
    through_lse[i] = upstream[i] * std::exp(-lse_in[N + i]);
  }
  if (!sampled.own) {
    a.lse = shift, a.grad_loss = through_lse;
    a.grad_shared = grad_shared, a.grad_offset = grad_offset;
    each_range(a, blocks_of(K), 1, shared_backward<T>);
  }

  const int place_bits = bits_of(K), entry_bits = place_bits + bits_of(N);
  const int item_bits = bits_of(items - 1);
  STD_TORCH_CHECK(entry_bits + item_bits <= 64, "too many rows x negatives x items to sort");
  std::vector<uint64_t> key;
  key.reserve((sampled.own ? N * K : K) + N);
  auto add = [&](int64_t item, int64_t row, int64_t place) {
    key.push_back(static_cast<uint64_t>(item) << entry_bits |
                  static_cast<uint64_t>(row) << place_bits | static_cast<uint64_t>(place));
  };
  for (int64_t i = 0; i < N; ++i) {
    const int64_t y = a.target[i];
    if (y < 0) continue;
    for (int64_t k = 0; sampled.own && k < K; ++k)
      if (a.drawn[i * K + k] != y) add(a.drawn[i * K + k], i, k);
    add(y, i, K);
  }
  for (int64_t k = 0; !sampled.own && k < K; ++k) add(a.drawn[k], N, k);
  sort_keys(key, entry_bits, item_bits);
  std::vector<int64_t> start;
  const int64_t entries = static_cast<int64_t>(key.size());
  for (int64_t e = 0; e < entries; ++e)
    if (e == 0 || key[e] >> entry_bits != key[e - 1] >> entry_bits) start.push_back(e);
  const int64_t distinct = static_cast<int64_t>(start.size());
  start.push_back(entries);

  const int64_t out_rows = sparse ? distinct : items;
  Tensor index = torch::stable::new_empty(sampled.target, {sparse ? distinct : 0});
  int64_t* index_out = data<int64_t>(index);
  for (int64_t u = 0; sparse && u < distinct; ++u)
    index_out[u] = static_cast<int64_t>(key[start[u]] >> entry_bits);
  Tensor grad_weight = torch::stable::new_empty(linear_weight, {out_rows, a.width});
  Tensor grad_bias = torch::stable::new_empty(linear_bias ? *linear_bias : lse,
                                              {linear_bias ? out_rows : 0});
  const int64_t item_size = static_cast<int64_t>(grad_weight.element_size());
  prefer_huge_pages(grad_weight, out_rows * a.width * item_size);
  SumArgs<T> all{};
  all.width = a.width, all.ld = a.ld, all.negatives = K, all.rows = N;
  all.key = key.data(), all.start = start.data();
  all.place_bits = place_bits, all.entry_bits = entry_bits, all.x = a.x;
  all.grad_loss = upstream, all.grad_target = data<T>(grad_target);
  all.grad_negatives = sampled.own ? data<T>(grad_negatives) : nullptr;
  all.grad_shared = grad_shared, all.grad_offset = grad_offset, all.sparse = sparse;
  all.grad_weight = grad_weight.data_ptr(), all.weight_dtype = grad_weight.scalar_type();
  all.grad_bias = linear_bias ? grad_bias.data_ptr() : nullptr;
  all.bias_dtype = grad_bias.scalar_type();
  all.weight_size = item_size, all.bias_size = static_cast<int64_t>(grad_bias.element_size());
  all.items = items, all.distinct = distinct;
  if (distinct == 0) zero_between(all, 0, out_rows);
  parallel_for(0, distinct, 256, [&](int64_t begin, int64_t end) {
    SumArgs<T> mine = all;
    mine.begin = begin, mine.end = end;
    sum_sorted<T>(mine);
  });
  return {index, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sampled_linear_cross_entropy_fwd(
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias,
    std::optional<Tensor> log_q, Tensor target, Tensor negatives, double beta, bool with_input,
    bool with_weight) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_typed<T>(
        Sampled<T>(input, linear_weight, linear_bias, log_q, target, negatives, beta), input,
        with_input, with_weight);
  };
  return input.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor, Tensor> sampled_linear_cross_entropy_bwd(
    Tensor input, Tensor linear_weight, std::optional<Tensor> linear_bias,
    std::optional<Tensor> log_q, Tensor target, Tensor negatives, Tensor grad_target,
    Tensor grad_negatives, Tensor lse, Tensor grad_loss, double beta, bool sparse) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward_typed<T>(
        Sampled<T>(input, linear_weight, linear_bias, log_q, target, negatives, beta),
        linear_weight, linear_bias, grad_target, grad_negatives, lse, grad_loss, sparse);
  };
  return input.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("sampled_linear_cross_entropy_fwd",
         TORCH_BOX(&fastrec::sampled_linear_cross_entropy_fwd));
  m.impl("sampled_linear_cross_entropy_bwd",
         TORCH_BOX(&fastrec::sampled_linear_cross_entropy_bwd));
}
