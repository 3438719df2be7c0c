// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::jagged_embedding_fwd, _bwd and _scatter. A task owns CHUNK events, or a
// range of sorted events that ends between two rows of the table.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "layer_norm.h"

namespace fastrec {
namespace {

// Events [begin, end), D width.
template <class T>
struct EmbeddingArgs {
  int64_t begin, end, width;
  const int64_t *values, *positions;  // values is null for the identity
  Rows weight, position_weight;       // data is null without positions
  bool normalize;
  const T *norm_weight, *norm_bias;
  T eps;
  Dropout dropout;
  T *mean, *rstd;
  void* output;  // forward
  ScalarType dtype;
  Rows grad_output;  // backward
  T *grad_z, *grad_norm_weight, *grad_norm_bias;
};

template <class T>
FASTREC_INLINE const T* gather(const EmbeddingArgs<T>& a, int64_t i, T* item, T* place, T* sum) {
  const T* x = row_of<T>(a.weight, a.values ? a.values[i] : i, item, a.width);
  if (!a.position_weight.data) return x;
  const T* p = row_of<T>(a.position_weight, a.positions[i], place, a.width);
#pragma omp simd
  for (int64_t d = 0; d < a.width; ++d) sum[d] = x[d] + p[d];
  return sum;
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_events(const EmbeddingArgs<T>& a) {
  const int64_t width = a.width;
  Buffer<T> item(width), place(width), sum(width), normed(width), out(width);
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    const T* z = gather<T>(a, i, item, place, sum);
    T* target = target_row<T>(a.output, a.dtype, i, out, width);
    if (a.normalize) {
      T* y = a.dropout.drop ? static_cast<T*>(normed) : target;
      normalize_row(z, a.norm_weight, a.norm_bias, a.eps, width, y, a.mean[i], a.rstd[i]);
      z = y;
    }
    if (a.dropout.drop)
      mask.apply(i, a.end, z, target);
    else if (z != target)
      std::copy_n(z, width, target);
    finish_row(target, a.output, a.dtype, i, width);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_events(const EmbeddingArgs<T>& a) {
  const int64_t width = a.width;
  Buffer<T> item(width), place(width), sum(width), scratch(width), masked(width);
  MaskTile<S> mask(a.dropout, width);
  for (int64_t i = a.begin; i < a.end; ++i) {
    T* grad_z = a.grad_z + i * width;
    const T* grad = row_of<T>(a.grad_output, i, scratch, width);
    if (a.dropout.drop) {
      mask.apply(i, a.end, grad, masked);
      grad = masked;
    }
    if (a.normalize)
      normalize_row_backward(gather<T>(a, i, item, place, sum), a.mean[i], a.rstd[i], grad,
                             a.norm_weight, width, grad_z, a.grad_norm_weight, a.grad_norm_bias);
    else if (grad != grad_z)
      std::copy_n(grad, width, grad_z);
  }
}

// Sorted events [begin, end), all events of their rows among them.
template <class T>
struct ScatterArgs {
  int64_t begin, end, width;
  const int64_t *index, *order;
  Rows grad;
  void* out;
  ScalarType dtype;
};

template <class S, class T = typename S::T>
FASTREC_INLINE void scatter_rows(const ScatterArgs<T>& a) {
  // The rounding error of a sum grows with the length of the chain: [MASK] is in every sequence.
  constexpr int64_t LINK = 64;
  const int64_t width = a.width;
  Buffer<T> scratch(width), total(width), part(width);
  for (int64_t i = a.begin; i < a.end;) {
    const int64_t row = a.index[a.order[i]];
    T *sum = total, *link = part;
    std::fill_n(sum, width, T(0));
    std::fill_n(link, width, T(0));
    for (int64_t n = 1; i < a.end && a.index[a.order[i]] == row; ++i, ++n) {
      const T* grad = row_of<T>(a.grad, a.order[i], scratch, width);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) link[d] += grad[d];
      if (n % LINK == 0) {
        for (int64_t d = 0; d < width; ++d) sum[d] += link[d];
        std::fill_n(link, width, T(0));
      }
    }
    for (int64_t d = 0; d < width; ++d) sum[d] += link[d];
    store_row<T>(sum, a.out, a.dtype, row * width, width);
  }
}

FASTREC_DEFINE_PER_ISA(forward, EmbeddingArgs, forward_events)
FASTREC_DEFINE_PER_ISA(backward, EmbeddingArgs, backward_events)
FASTREC_DEFINE_PER_ISA(scatter, ScatterArgs, scatter_rows)

// Events sorted by index, equal ones in their order: counting sort by 11 bits at a time.
std::vector<int64_t> sorted_events(const int64_t* index, int64_t events, int64_t rows) {
  constexpr int BITS = 11;
  std::vector<int64_t> order(events), next(events);
  for (int64_t i = 0; i < events; ++i) order[i] = i;
  for (int shift = 0; (rows - 1) >> shift > 0; shift += BITS) {
    std::vector<int64_t> place((1 << BITS) + 1, 0);
    auto digit = [&](int64_t i) { return (index[i] >> shift) & ((1 << BITS) - 1); };
    for (int64_t i = 0; i < events; ++i) ++place[digit(i) + 1];
    for (size_t bin = 1; bin < place.size(); ++bin) place[bin] += place[bin - 1];
    for (int64_t i : order) next[place[digit(i)]++] = i;
    order.swap(next);
  }
  return order;
}

void check_index(const int64_t* index, int64_t events, int64_t rows) {
  for (int64_t i = 0; i < events; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < rows, "index ", index[i], " is outside [0, ", rows,
                    ")");
}

// What forward and backward share: the tensors behind EmbeddingArgs.
template <class T>
struct Embedding {
  Embedding(const std::optional<Tensor>& values_, const Tensor& weight_,
            const std::optional<Tensor>& position_weight_,
            const std::optional<Tensor>& norm_weight_, const std::optional<Tensor>& norm_bias_,
            DropoutTensors dropout_)
      : values(contiguous_or_none(values_)),
        weight(weight_),
        position_weight(position_weight_),
        norm_weight(norm_weight_, weight_.size(1), T(1)),
        norm_bias(norm_bias_, weight_.size(1), T(0)),
        dropout(std::move(dropout_)),
        events(values ? values->size(0) : weight_.size(0)),
        width(weight_.size(1)) {
    dropout.check_rows(events);
    STD_TORCH_CHECK(!position_weight_ || dropout.positions, "position_weight needs positions");
    if (position_weight_)
      check_size("position_weight", position_weight_, {position_weight_->size(0), width});
    if (values) check_index(int64_data(values), events, weight_.size(0));
    if (position_weight_) check_index(dropout.value.positions, events, position_weight_->size(0));
    args.end = events, args.width = width;
    args.values = int64_data(values), args.positions = dropout.value.positions;
    args.weight = weight.rows, args.position_weight = position_weight.rows;
    args.normalize = norm_weight_.has_value();
    args.norm_weight = norm_weight, args.norm_bias = norm_bias;
    args.dropout = dropout.value;
  }

  std::optional<Tensor> values;
  Matrix weight, position_weight;
  Vector<T> norm_weight, norm_bias;
  DropoutTensors dropout;
  int64_t events, width;
  EmbeddingArgs<T> args{
      0, 0, 0, nullptr, nullptr, {}, {}, false, nullptr, nullptr, T(0),
      Dropout{nullptr, nullptr, PhiloxKey(0, 0, Site::embedding, 0), 0}};
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward_typed(Embedding<T> embedding, const Tensor& weight,
                                                 double eps) {
  int64_t events = embedding.events;
  EmbeddingArgs<T>& all = embedding.args;
  Tensor output = torch::stable::new_empty(weight, {events, embedding.width});
  int64_t rows = all.normalize ? events : 0;
  Tensor mean = torch::stable::new_empty(weight, {rows}, compute_dtype<T>());
  Tensor rstd = torch::stable::new_empty(weight, {rows}, compute_dtype<T>());
  all.eps = static_cast<T>(eps);
  all.mean = data<T>(mean), all.rstd = data<T>(rstd);
  all.output = output.data_ptr(), all.dtype = output.scalar_type();
  parallel_for(0, events, CHUNK, [&](int64_t begin, int64_t end) {
    EmbeddingArgs<T> mine = all;
    mine.begin = begin, mine.end = end;
    forward<T>(mine);
  });
  return {output, mean, rstd};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_typed(Embedding<T> embedding, const Tensor& grad_output,
                                                  const std::optional<Tensor>& norm_weight,
                                                  const std::optional<Tensor>& norm_bias,
                                                  const Tensor& mean, const Tensor& rstd) {
  int64_t events = embedding.events, width = embedding.width;
  int64_t chunks = (events + CHUNK - 1) / CHUNK;
  EmbeddingArgs<T>& all = embedding.args;
  check_size("grad_output", grad_output, {events, width});
  if (norm_weight) check_size("mean", mean, {events}), check_size("rstd", rstd, {events});
  Matrix grad(grad_output);
  Tensor mu = torch::stable::contiguous(mean), s = torch::stable::contiguous(rstd);
  Tensor grad_z = torch::stable::new_empty(mean, {events, width});
  Tensor grad_weight =
      torch::stable::new_empty(norm_weight ? *norm_weight : mean, {norm_weight ? width : 0});
  Tensor grad_bias =
      torch::stable::new_empty(norm_bias ? *norm_bias : mean, {norm_bias ? width : 0});
  Buffer<T> partials(chunks * 2 * width);
  all.mean = data<T>(mu), all.rstd = data<T>(s);
  all.grad_output = grad.rows, all.grad_z = data<T>(grad_z);
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      EmbeddingArgs<T> mine = all;
      mine.begin = c * CHUNK, mine.end = std::min(events, mine.begin + CHUNK);
      mine.grad_norm_weight = partials + c * 2 * width;
      mine.grad_norm_bias = mine.grad_norm_weight + width;
      std::fill_n(mine.grad_norm_weight, 2 * width, T(0));
      backward<T>(mine);
    }
  });
  if (norm_weight)
    sum_chunks<T>(partials, chunks, 2 * width, width, grad_weight.data_ptr(),
                  grad_weight.scalar_type());
  if (norm_bias)
    sum_chunks<T>(partials + width, chunks, 2 * width, width, grad_bias.data_ptr(),
                  grad_bias.scalar_type());
  return {grad_z, grad_weight, grad_bias};
}

template <class T>
Tensor scatter_typed(const Tensor& grad, const Tensor& index, int64_t rows, ScalarType dtype) {
  int64_t events = index.size(0), width = grad.size(1);
  check_size("grad", grad, {events, width});
  bytes_of(dtype);
  Matrix source(grad);
  Tensor ids = torch::stable::contiguous(index);
  const int64_t* row = int64_data(ids);
  check_index(row, events, rows);
  Tensor out = torch::stable::new_zeros(grad, {rows, width}, dtype);
  std::vector<int64_t> order = sorted_events(row, events, rows);
  // The first event of the row that sorted event i belongs to: tasks share no row.
  auto boundary = [&](int64_t i) {
    while (i > 0 && i < events && row[order[i]] == row[order[i - 1]]) --i;
    return i;
  };
  ScatterArgs<T> all{0, events, width, row, order.data(), source.rows, out.data_ptr(), dtype};
  parallel_for(0, events, 4 * CHUNK, [&](int64_t begin, int64_t end) {
    ScatterArgs<T> mine = all;
    mine.begin = boundary(begin), mine.end = boundary(end);
    scatter<T>(mine);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> jagged_embedding_fwd(
    std::optional<Tensor> values, Tensor weight, std::optional<Tensor> position_weight,
    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
    std::optional<Tensor> keys, std::optional<Tensor> positions, std::optional<Tensor> rng,
    int64_t drop, int64_t site, int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward_typed(
        Embedding<T>(values, weight, position_weight, norm_weight, norm_bias, dropout), weight,
        eps);
  };
  return weight.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

std::tuple<Tensor, Tensor, Tensor> jagged_embedding_bwd(
    Tensor grad_output, std::optional<Tensor> values, Tensor weight,
    std::optional<Tensor> position_weight, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, Tensor mean, Tensor rstd, std::optional<Tensor> keys,
    std::optional<Tensor> positions, std::optional<Tensor> rng, int64_t drop, int64_t site,
    int64_t layer) {
  DropoutTensors dropout(keys, positions, rng, drop, site, layer);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward_typed(
        Embedding<T>(values, weight, position_weight, norm_weight, norm_bias, dropout),
        grad_output, norm_weight, norm_bias, mean, rstd);
  };
  return weight.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

Tensor jagged_embedding_scatter(Tensor grad, Tensor index, int64_t rows, ScalarType dtype) {
  auto* typed = grad.scalar_type() == ScalarType::Double ? scatter_typed<double>
                                                         : scatter_typed<float>;
  return typed(grad, index, rows, dtype);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("jagged_embedding_fwd", TORCH_BOX(&fastrec::jagged_embedding_fwd));
  m.impl("jagged_embedding_bwd", TORCH_BOX(&fastrec::jagged_embedding_bwd));
  m.impl("jagged_embedding_scatter", TORCH_BOX(&fastrec::jagged_embedding_scatter));
}
