// SPDX-License-Identifier: Apache-2.0
// CPU kernels of fastrec::jagged_gru_fwd and _bwd: the recurrence alone. The product of the inputs
// with their weight is made before, those of the weight gradients after it, for all events at once.
//
// A task owns sequences, longest first, so that those that still run at a time step are its first
// rows: a step is one product of their states, taken some rows at a time with the gates that follow
// while these lie in the cache. A row of a product does not depend on the others, so the bits of a
// sequence depend neither on its task nor on the batch.
//
// Legend: T events, H width of a state h, x [T, 3H] what the inputs give the gates r, z, n,
// q = W_hn h + b_hn.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "gates.h"
#include "pack.h"

namespace fastrec {
namespace {

constexpr int64_t ROWS = 48;  // of a product and the gates that follow: 40 KB at H = 64

template <class T>
struct GruArgs {
  const int64_t *starts, *lengths;  // of the sequences of a task, longest first
  int64_t count, h;
  const T *panels, *bias;  // forward: H x 3H, padded; backward: 3H x H, null
  const T* x;              // forward
  const T* grad_states;    // backward
  int64_t grad_row;
  T *states, *gates;     // [T, H], [T, 4H] q r z n: written by forward (null: not wanted), then read
  T *grads, *previous;   // backward: [T, 4H] of q r z n before their functions; [T, H] h before
};

// Whole vectors, or the first `left` numbers of one.
template <class S, class T = typename S::T>
FASTREC_INLINE typename S::V load_part(const T* p, int64_t left) {
  if (left >= S::lanes) return S::load(p);
  T part[S::lanes] = {};
  std::copy_n(p, left, part);
  return S::load(part);
}
template <class S, class T = typename S::T>
FASTREC_INLINE void store_part(T* p, int64_t left, typename S::V v) {
  if (left >= S::lanes) return S::store(p, v);
  T part[S::lanes];
  S::store(part, v);
  std::copy_n(part, left, p);
}

// N vectors of the state of one event, from feature d: g = W_hh h + b_hh.
template <class S, int N, class T = typename S::T>
FASTREC_INLINE void cell(int64_t d, int64_t h, const T* x, const T* g, T* state, T* out, T* gates) {
  constexpr int L = S::lanes;
  typename S::V rz[2 * N], n[N], q[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const int64_t at = d + i * L;
    rz[i] = load_part<S>(x + at, h - at) + S::load(g + at);
    rz[N + i] = load_part<S>(x + h + at, h - at) + S::load(g + h + at);
  }
  sigmoid<S, 2 * N>(rz);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const int64_t at = d + i * L;
    q[i] = S::load(g + 2 * h + at);
    n[i] = load_part<S>(x + 2 * h + at, h - at) + rz[i] * q[i];
  }
  tanh<S, N>(n);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const int64_t at = d + i * L, left = h - at;
    const typename S::V next = n[i] + rz[N + i] * (S::load(state + at) - n[i]);
    S::store(state + at, next);
    store_part<S>(out + at, left, next);
    if (!gates) continue;
    store_part<S>(gates + at, left, q[i]);
    store_part<S>(gates + h + at, left, rz[i]);
    store_part<S>(gates + 2 * h + at, left, rz[N + i]);
    store_part<S>(gates + 3 * h + at, left, n[i]);
  }
}

template <class S, class T = typename S::T>
FASTREC_INLINE void forward_sequences(const GruArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  const int64_t h = a.h, width = round_up(h, LANES), g_row = round_up(3 * h, LANES) + LANES;
  Buffer<T> state(a.count * width), g(ROWS * g_row);
  std::fill_n(static_cast<T*>(state), a.count * width, T(0));
  const T one = 1;
  int64_t running = a.count;
  for (int64_t t = 0;; ++t) {
    while (running > 0 && a.lengths[running - 1] <= t) --running;
    if (running == 0) break;
    for (int64_t first = 0; first < running; first += ROWS) {
      const int64_t rows = std::min(ROWS, running - first);
      product<S>({rows, h, 3 * h, state + first * width, width, 1, a.panels, NR, h * NR, g, g_row,
                  &one, 0, false, a.bias});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t event = a.starts[first + r] + t;
        const T *x = a.x + event * 3 * h, *from = g + r * g_row;
        T *own = state + (first + r) * width, *out = a.states + event * h;
        T* gates = a.gates ? a.gates + event * 4 * h : nullptr;
        int64_t d = 0;
        for (; d + 4 * S::lanes <= h; d += 4 * S::lanes)
          cell<S, 4>(d, h, x, from, own, out, gates);
        for (; d < h; d += S::lanes) cell<S, 1>(d, h, x, from, own, out, gates);
      }
    }
  }
}

// One vector of the gradients of an event, from feature d. `own` is the gradient of the state from
// the later events, and becomes what reaches the earlier ones past the products; `g` [3H] what
// reaches them through these.
template <class S, class T = typename S::T>
FASTREC_INLINE void cell_backward(int64_t d, int64_t h, const T* grad_state, const T* gates,
                                  const T* before, T* own, T* g, T* grads, T* previous) {
  using V = typename S::V;
  const int64_t left = h - d;
  const V q = load_part<S>(gates + d, left), r = load_part<S>(gates + h + d, left);
  const V z = load_part<S>(gates + 2 * h + d, left), n = load_part<S>(gates + 3 * h + d, left);
  const V grad = S::load(own + d) + load_part<S>(grad_state + d, left);
  const V old = before ? load_part<S>(before + d, left) : V{};
  const V grad_n = grad * (T(1) - z) * (T(1) - n * n), grad_q = grad_n * r;
  const V grad_r = grad_n * q * r * (T(1) - r), grad_z = grad * (old - n) * z * (T(1) - z);
  S::store(own + d, grad * z);
  store_part<S>(g + d, left, grad_r);
  store_part<S>(g + h + d, left, grad_z);
  store_part<S>(g + 2 * h + d, left, grad_q);
  store_part<S>(grads + d, left, grad_q);
  store_part<S>(grads + h + d, left, grad_r);
  store_part<S>(grads + 2 * h + d, left, grad_z);
  store_part<S>(grads + 3 * h + d, left, grad_n);
  store_part<S>(previous + d, left, old);
}

template <class S, class T = typename S::T>
FASTREC_INLINE void backward_sequences(const GruArgs<T>& a) {
  constexpr int64_t NR = SmallGemm<S>::NR;
  const int64_t h = a.h, width = round_up(h, LANES), g_row = round_up(3 * h, LANES) + LANES;
  Buffer<T> state(a.count * width), g(ROWS * g_row);
  std::fill_n(static_cast<T*>(state), a.count * width, T(0));
  const T one = 1;
  int64_t running = 0;
  for (int64_t t = a.count ? a.lengths[0] - 1 : -1; t >= 0; --t) {
    while (running < a.count && a.lengths[running] > t) ++running;
    for (int64_t first = 0; first < running; first += ROWS) {
      const int64_t rows = std::min(ROWS, running - first);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t event = a.starts[first + r] + t;
        const T* before = t > 0 ? a.states + (event - 1) * h : nullptr;
        for (int64_t d = 0; d < h; d += S::lanes)
          cell_backward<S, T>(d, h, a.grad_states + event * a.grad_row, a.gates + event * 4 * h,
                              before, state + (first + r) * width, g + r * g_row,
                              a.grads + event * 4 * h, a.previous + event * h);
      }
      if (t > 0)
        product<S>({rows, 3 * h, h, g, g_row, 1, a.panels, NR, 3 * h * NR, state + first * width,
                    width, &one, 0, true, nullptr});
    }
  }
}

FASTREC_DEFINE_PER_ISA(gru_forward, GruArgs, forward_sequences)
FASTREC_DEFINE_PER_ISA(gru_backward, GruArgs, backward_sequences)

// The sequences, dealt to tasks longest first: each has its share of the long ones.
struct Tasks {
  Tasks(const Tensor& offsets, int64_t events) {
    const int64_t* at = int64_data(offsets);
    const int64_t sequences = offsets.size(0) - 1;
    check_offsets(at, sequences, events);
    used = at[sequences];
    std::vector<int64_t> order(sequences);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return at[a + 1] - at[a] > at[b + 1] - at[b];
    });
    // A product of fewer rows than a tile has costs as much as one of a tile.
    const int64_t most = (sequences + AFTER - 1) / AFTER;
    count = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), most));
    for (int64_t k = 0; k < count; ++k) {
      first.push_back(starts.size());
      for (int64_t i = k; i < sequences; i += count) {
        starts.push_back(at[order[i]]);
        lengths.push_back(at[order[i] + 1] - at[order[i]]);
      }
    }
    first.push_back(starts.size());
  }

  template <class T, class F>
  void run(const GruArgs<T>& all, const F& kernel) const {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        GruArgs<T> mine = all;
        mine.starts = starts.data() + first[k], mine.lengths = lengths.data() + first[k];
        mine.count = first[k + 1] - first[k];
        kernel(mine);
      }
    });
  }

  int64_t count, used;
  std::vector<int64_t> first, starts, lengths;
};

// Events behind the last offset belong to no sequence.
template <class T>
void clear_after(int64_t used, Tensor& rows) {
  std::fill(data<T>(rows) + used * rows.size(1), data<T>(rows) + rows.numel(), T(0));
}

std::tuple<Tensor, Tensor> jagged_gru_fwd(Tensor projected, Tensor offsets, Tensor weight_hh,
                                          std::optional<Tensor> bias_hh, bool gates_needed) {
  Tensor x = torch::stable::contiguous(projected), w = torch::stable::contiguous(weight_hh);
  Tensor bounds = torch::stable::contiguous(offsets);
  const int64_t events = x.size(0), h = w.size(1);
  check_size("projected", x, {events, 3 * h}), check_size("weight_hh", w, {3 * h, h});
  Tasks tasks(bounds, events);
  Tensor states = torch::stable::new_empty(x, {events, h});
  Tensor gates = torch::stable::new_empty(x, {gates_needed ? events : 0, 4 * h});
  auto run = [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> panels = packed(static_cast<const T*>(data<T>(w)), 1, h, h, 3 * h);
    std::optional<Buffer<T>> bias;
    if (bias_hh) bias.emplace(padded<T>(*bias_hh, 3 * h));
    clear_after<T>(tasks.used, states);
    if (gates_needed) clear_after<T>(tasks.used, gates);
    GruArgs<T> all{};
    all.h = h, all.panels = panels, all.bias = bias ? static_cast<const T*>(*bias) : nullptr;
    all.x = data<T>(x), all.states = data<T>(states);
    all.gates = gates_needed ? data<T>(gates) : nullptr;
    tasks.run(all, gru_forward<T>);
  };
  x.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {states, gates};
}

std::tuple<Tensor, Tensor> jagged_gru_bwd(Tensor grad_states, Tensor states, Tensor gates,
                                          Tensor offsets, Tensor weight_hh) {
  Tensor w = torch::stable::contiguous(weight_hh), bounds = torch::stable::contiguous(offsets);
  Tensor old = torch::stable::contiguous(states), saved = torch::stable::contiguous(gates);
  Matrix grad(grad_states);
  const int64_t events = old.size(0), h = w.size(1);
  check_size("grad_states", grad_states, {events, h}), check_size("states", old, {events, h});
  check_size("gates", saved, {events, 4 * h}), check_size("weight_hh", w, {3 * h, h});
  Tasks tasks(bounds, events);
  Tensor grads = torch::stable::new_empty(old, {events, 4 * h});
  Tensor previous = torch::stable::new_empty(old, {events, h});
  auto run = [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> panels = packed(static_cast<const T*>(data<T>(w)), h, 1, 3 * h, h);
    clear_after<T>(tasks.used, grads);
    clear_after<T>(tasks.used, previous);
    GruArgs<T> all{};
    all.h = h, all.panels = panels, all.grad_states = grad.elements<T>();
    all.grad_row = grad.rows.stride / int64_t(sizeof(T));
    all.states = data<T>(old), all.gates = data<T>(saved);
    all.grads = data<T>(grads), all.previous = data<T>(previous);
    tasks.run(all, gru_backward<T>);
  };
  old.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {grads, previous};
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("jagged_gru_fwd", TORCH_BOX(&fastrec::jagged_gru_fwd));
  m.impl("jagged_gru_bwd", TORCH_BOX(&fastrec::jagged_gru_bwd));
}
