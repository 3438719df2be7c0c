// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::jagged_max_pool_fwd and _bwd. A task owns a range of sequences, and every
// element of a result is written by one of them.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "layer_norm.h"

namespace fastrec {
namespace {

// Sequences [begin, end), D width.
template <class T>
struct PoolArgs {
  int64_t begin, end, width;
  const int64_t* offsets;
  const bool* mask;  // null: every event counts
  Rows source;       // values, or grad_output
  void* out;         // output, or grad_values
  ScalarType dtype;
  int32_t* index;  // [B, D]: the event inside its sequence, -1 for none
};

// Lifts the maxima to those of the event `here`. A NaN is above everything, and of equal values the
// first one stays. A plain loop: gcc 12 takes selections by two joined comparisons of its vector
// types lane by lane (10 times slower).
template <class T, class Place>
FASTREC_INLINE void lift(const T* x, Place here, int64_t width, T* __restrict best,
                         Place* __restrict place) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    const bool over = !(x[d] <= best[d]) & (best[d] == best[d]);
    best[d] = over ? x[d] : best[d];
    place[d] = over ? here : place[d];
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_sequences(const PoolArgs<T>& a) {
  using Place = typename S::C::Bits;
  const int64_t width = a.width;
  Buffer<T> scratch(width), best(width);
  Buffer<Place> place(width);
  for (int64_t b = a.begin; b < a.end; ++b) {
    const int64_t first = a.offsets[b], last = a.offsets[b + 1];
    int64_t t = first;
    while (t < last && a.mask && !a.mask[t]) ++t;
    // The first event that counts, -inf and all, or nothing.
    if (t < last)
      std::copy_n(row_of<T>(a.source, t, scratch, width), width, static_cast<T*>(best));
    else
      std::fill_n(static_cast<T*>(best), width, T(0));
    std::fill_n(static_cast<Place*>(place), width, t < last ? Place(t - first) : Place(-1));
    for (++t; t < last; ++t) {
      if (a.mask && !a.mask[t]) continue;
      lift<T, Place>(row_of<T>(a.source, t, scratch, width), Place(t - first), width, best, place);
    }
    store_row<T>(best, a.out, a.dtype, b * width, width);
    for (int64_t d = 0; d < width; ++d) a.index[b * width + d] = int32_t(place[d]);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_sequences(const PoolArgs<T>& a) {
  const int64_t width = a.width, item = bytes_of(a.dtype);
  char* out = static_cast<char*>(a.out);
  for (int64_t b = a.begin; b < a.end; ++b) {
    const int64_t first = a.offsets[b], rows = a.offsets[b + 1] - first;
    std::memset(out + first * width * item, 0, rows * width * item);
    const char* grad = a.source.data + b * a.source.stride;
    const int32_t* index = a.index + b * width;
    int32_t last = -1;
    for (int64_t d = 0; d < width; ++d) last = std::max(last, index[d]);
    STD_TORCH_CHECK(last < rows, "index ", last, " is outside a sequence of ", rows, " events");
    auto place = [&](auto zero) __attribute__((always_inline)) {
      using Element = decltype(zero);
      auto* to = reinterpret_cast<Element*>(out) + first * width;
      auto* from = reinterpret_cast<const Element*>(grad);
      for (int64_t d = 0; d < width; ++d)
        if (index[d] >= 0) to[index[d] * width + d] = from[d];
    };
    if (item == 8)
      place(int64_t{});
    else if (item == 4)
      place(int32_t{});
    else
      place(int16_t{});
  }
}

FASTREC_DEFINE_PER_ISA(pool_forward, PoolArgs, forward_sequences)

void check(const Tensor& offsets, int64_t events) {
  const int64_t* at = int64_data(offsets);
  int64_t sequences = offsets.size(0) - 1;
  check_offsets(at, sequences, events);
  for (int64_t b = 0; b < sequences; ++b)
    STD_TORCH_CHECK(at[b + 1] - at[b] <= INT32_MAX, "sequence ", b, " has ", at[b + 1] - at[b],
                    " events");
}

// Sequences of a task: 2^14 elements on average.
int64_t grain(int64_t sequences, int64_t elements) {
  return std::max<int64_t>(1, (sequences << 14) / std::max<int64_t>(1, elements));
}

std::tuple<Tensor, Tensor> jagged_max_pool_fwd(Tensor values, Tensor offsets,
                                               std::optional<Tensor> mask) {
  Tensor bounds = torch::stable::contiguous(offsets);
  std::optional<Tensor> counted = contiguous_or_none(mask);
  int64_t events = values.size(0), width = values.size(1), sequences = bounds.size(0) - 1;
  check(bounds, events);
  check_size("mask", mask, {events});
  Matrix source(values);
  Tensor output = torch::stable::new_empty(values, {sequences, width});
  Tensor index = torch::stable::new_empty(values, {sequences, width}, ScalarType::Int);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    PoolArgs<T> all{0, sequences, width, int64_data(bounds),
                    counted ? data<bool>(*counted) : nullptr, source.rows,
                    output.data_ptr(), output.scalar_type(),
                    data<int32_t>(index)};
    parallel_for(0, sequences, grain(sequences, events * width), [&](int64_t begin, int64_t end) {
      PoolArgs<T> mine = all;
      mine.begin = begin, mine.end = end;
      pool_forward<T>(mine);
    });
  };
  values.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {output, index};
}

Tensor jagged_max_pool_bwd(Tensor grad_output, Tensor index, Tensor offsets, int64_t events) {
  Tensor bounds = torch::stable::contiguous(offsets), at = torch::stable::contiguous(index);
  int64_t width = grad_output.size(1), sequences = bounds.size(0) - 1;
  check(bounds, events);
  check_size("grad_output", grad_output, {sequences, width});
  check_size("index", index, {sequences, width});
  Matrix source(grad_output);
  Tensor grad = torch::stable::new_empty(grad_output, {events, width});
  const int64_t used = int64_data(bounds)[sequences];  // the rest belongs to no sequence
  const int64_t bytes = width * static_cast<int64_t>(grad.element_size());
  std::memset(static_cast<char*>(grad.data_ptr()) + used * bytes, 0, (events - used) * bytes);
  PoolArgs<float> all{0, sequences, width, int64_data(bounds), nullptr, source.rows,
                      grad.data_ptr(), grad.scalar_type(), data<int32_t>(at)};
  parallel_for(0, sequences, grain(sequences, events * width), [&](int64_t begin, int64_t end) {
    PoolArgs<float> mine = all;
    mine.begin = begin, mine.end = end;
    backward_sequences<Simd<float, 16>>(mine);
  });
  return grad;
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("jagged_max_pool_fwd", TORCH_BOX(&fastrec::jagged_max_pool_fwd));
  m.impl("jagged_max_pool_bwd", TORCH_BOX(&fastrec::jagged_max_pool_bwd));
}
