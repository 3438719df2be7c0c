// CPU kernels of fastrec::linear_cross_entropy_fwd and _bwd: shapes, dtypes, tasks and threads.
// The arithmetic is in linear_cross_entropy.h, the products in gemm.h.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
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

template <class T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// The tensors of a problem, without the rows that are not scored.
template <class T>
struct Scored {
  Scored(const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
         const Tensor& target)
      : weight(with_contiguous_rows(linear_weight)) {
    Tensor ids = torch::stable::contiguous(target);
    const int64_t* y = static_cast<const int64_t*>(ids.data_ptr());
    int64_t items = weight.size(0), width = weight.size(1);
    for (int64_t i = 0; i < input.size(0); ++i) {
      STD_TORCH_CHECK(y[i] < items, "target ", y[i], " is outside [0, ", items, ")");
      if (y[i] >= 0) {
        row.push_back(i);
        item.push_back(y[i]);
      }
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
      bias = torch::stable::contiguous(torch::stable::to(*linear_bias, dtype_of<T>()));
    problem = {count, items, width, ld, *x, item.data(), rows_of(weight),
               bias ? static_cast<const T*>(bias->data_ptr()) : nullptr};
  }

  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> row, item;
  std::unique_ptr<Buffer<T>> x;
  Problem<T> problem;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits the sweep into row blocks x ranges of items. Depends on shapes only, never on the number
// of threads: the ranges decide the order of the additions.
template <class T>
void plan(ForwardArgs<T>& a) {
  const Problem<T>& q = a.problem;
  int64_t blocks = std::max<int64_t>(1, divide_up(q.rows, BLOCK));
  a.block = round_up(divide_up(q.rows, blocks), 12);  // equal blocks, whole register tiles
  a.blocks = a.block ? divide_up(q.rows, a.block) : 0;
  if (!a.blocks) return;
  int64_t partial = q.rows * (q.width + 2);  // numbers per range
  double work = double(q.rows) * double(q.items) * double(q.width);
  int64_t ranges = divide_up(256, a.blocks);  // balance on many cores
  // A task below 2^19 multiply-adds (about 25 us) does not pay for its start.
  ranges = std::min<int64_t>(ranges, int64_t(std::min(work / (1 << 19), 1e6)) / a.blocks);
  // Partials below 1 % of the logits, unless they are small anyway.
  ranges = std::min(ranges, std::max(q.items / (100 * (q.width + 2)), (1 << 16) / partial));
  ranges = std::max<int64_t>(1, std::min(ranges, divide_up(q.items, TILE)));
  a.range = round_up(divide_up(q.items, ranges), TILE);
  a.ranges = divide_up(q.items, a.range);
}

template <class T>
void combine(const ForwardArgs<T>& a, int64_t i, T& lse, T* weight_mean) {
  const Problem<T>& q = a.problem;
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < a.ranges; ++r) top = std::max(top, a.top[r * q.rows + i]);
  double sum = 0;
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    sum += scale * a.sum[r * q.rows + i];
  }
  lse = static_cast<T>(top + std::log(sum));
  if (lse < a.target_logit[i]) lse = a.target_logit[i];
  if (!a.with_weight_mean) return;
  std::fill_n(weight_mean, q.width, T(0));
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    T factor = static_cast<T>(sum == 0 ? 0 : scale / sum);
    const T* weighted = a.weighted + (r * q.rows + i) * q.width;
    for (int64_t d = 0; d < q.width; ++d) weight_mean[d] += factor * weighted[d];
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_typed(const Tensor& input, const Tensor& linear_weight,
                                                 const std::optional<Tensor>& linear_bias,
                                                 const Tensor& target, bool with_weight_mean) {
  Scored<T> scored(input, linear_weight, linear_bias, target);
  const Problem<T>& q = scored.problem;
  int64_t rows = input.size(0), mean_rows = with_weight_mean ? rows : 0;
  Tensor lse = torch::stable::new_zeros(input, {rows}, dtype_of<T>());
  Tensor target_logit = torch::stable::new_zeros(input, {rows}, dtype_of<T>());
  Tensor weight_mean = torch::stable::new_zeros(input, {mean_rows, q.width}, dtype_of<T>());

  ForwardArgs<T> a{};
  a.problem = q;
  a.with_weight_mean = with_weight_mean;
  plan(a);
  int64_t partials = a.ranges * q.rows;
  Buffer<T> top(partials), weighted(with_weight_mean ? partials * q.width : 0), logit(q.rows);
  Buffer<double> sum(partials);
  a.top = top, a.sum = sum, a.weighted = weighted, a.target_logit = logit;
  run(a, a.blocks * a.ranges, forward<T>);

  T* lse_out = static_cast<T*>(lse.data_ptr());
  T* logit_out = static_cast<T*>(target_logit.data_ptr());
  T* mean_out = static_cast<T*>(weight_mean.data_ptr());
  torch::stable::parallel_for(0, q.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t row = scored.row[i];
      combine(a, i, lse_out[row], with_weight_mean ? mean_out + row * q.width : nullptr);
      logit_out[row] = logit[i];
    }
  });
  return {lse, target_logit, weight_mean};
}

template <class T>
std::vector<T> gather(const Tensor& values, const std::vector<int64_t>& rows) {
  Tensor source = torch::stable::contiguous(values);
  const T* data = static_cast<const T*>(source.data_ptr());
  std::vector<T> out;
  out.reserve(rows.size());
  for (int64_t row : rows) out.push_back(data[row]);
  return out;
}

template <class T>
std::tuple<Tensor, Tensor> backward_typed(const Tensor& input, const Tensor& linear_weight,
                                          const std::optional<Tensor>& linear_bias,
                                          const Tensor& target, const Tensor& lse,
                                          const Tensor& grad_lse, const Tensor& grad_target_logit) {
  Scored<T> scored(input, linear_weight, linear_bias, target);
  const Problem<T>& q = scored.problem;
  Tensor grad_weight = torch::stable::new_empty(linear_weight, {q.items, q.width});
  Tensor grad_bias = torch::stable::new_empty(linear_bias ? *linear_bias : lse,
                                              {linear_bias ? q.items : 0});
  std::vector<T> shift = gather<T>(lse, scored.row);
  std::vector<T> row_grad = gather<T>(grad_lse, scored.row);
  std::vector<T> target_grad = gather<T>(grad_target_logit, scored.row);
  for (T& value : shift) value = finite_shift(value);
  std::vector<OneHot> one_hot(q.rows);
  for (int64_t i = 0; i < q.rows; ++i) one_hot[i] = {scored.item[i], i};
  std::sort(one_hot.begin(), one_hot.end());

  BackwardArgs<T> a{};
  a.problem = q;
  a.block = q.items < 32 * BLOCK ? BLOCK / 2 : BLOCK;  // few items: more tasks to share
  a.blocks = divide_up(q.items, a.block);
  a.shift = shift.data(), a.grad_lse = row_grad.data(), a.grad_target_logit = target_grad.data();
  a.one_hot = one_hot.data();
  a.grad_weight = grad_weight.data_ptr(), a.weight_dtype = grad_weight.scalar_type();
  a.grad_bias = linear_bias ? grad_bias.data_ptr() : nullptr;
  a.bias_dtype = grad_bias.scalar_type();
  run(a, a.blocks, backward<T>);
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd(Tensor input, Tensor linear_weight,
                                                            std::optional<Tensor> linear_bias,
                                                            Tensor target, bool with_weight_mean) {
  auto* typed = input.scalar_type() == ScalarType::Double ? forward_typed<double>
                                                          : forward_typed<float>;
  return typed(input, linear_weight, linear_bias, target, with_weight_mean);
}

std::tuple<Tensor, Tensor> linear_cross_entropy_bwd(Tensor input, Tensor linear_weight,
                                                    std::optional<Tensor> linear_bias,
                                                    Tensor target, Tensor lse, Tensor grad_lse,
                                                    Tensor grad_target_logit) {
  auto* typed = input.scalar_type() == ScalarType::Double ? backward_typed<double>
                                                          : backward_typed<float>;
  return typed(input, linear_weight, linear_bias, target, lse, grad_lse, grad_target_logit);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastrec::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&fastrec::linear_cross_entropy_bwd));
}
