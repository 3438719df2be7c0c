// SPDX-License-Identifier: Apache-2.0
// The sweeps of linear_cross_entropy.h as calls: buffers, tasks, and the results of the rows.
#pragma once

#include <algorithm>
#include <vector>

#include "linear_cross_entropy_bf16.h"
#include "linear_cross_entropy_stored.h"
#include "scored.h"

namespace fastrec {
namespace {

// Splits the sweep into row blocks x ranges of items. Depends on shapes only, never on the number
// of threads: the ranges decide the order of the additions.
template <class T>
void plan(ForwardArgs<T>& a, int64_t block) {
  const Problem<T>& q = a.problem;
  int64_t blocks = std::max<int64_t>(1, divide_up(q.rows, block));
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
void combine(const ForwardArgs<T>& a, int64_t i, T& lse, T& rest, T* mean_offset) {
  const Problem<T>& q = a.problem;
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < a.ranges; ++r) top = std::max(top, a.top[r * q.rows + i]);
  double sum = 0;
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    sum += scale * a.sum[r * q.rows + i];
  }
  split_lse(top, std::log(sum), lse, rest);
  if (lse < a.target_logit[i]) lse = a.target_logit[i], rest = 0;
  rest = std::max(rest, a.target_logit[i] - lse);  // p_y <= 1 and loss >= 0 in spite of rounding
  if (!a.with_mean) return;
  q.weight.load(q.target[i], mean_offset, q.width);  // as the kernel multiplied it
  for (int64_t d = 0; d < q.width; ++d)
    mean_offset[d] = q.bf16 != Bf16::none ? -widen(BFloat16(mean_offset[d])) : -mean_offset[d];
  for (int64_t r = 0; r < a.ranges; ++r) {
    double scale = std::exp(double(a.top[r * q.rows + i]) - finite_shift(top));
    T factor = static_cast<T>(sum == 0 ? 0 : scale / sum);
    const T* weighted = a.weighted + (r * q.rows + i) * q.width;
    for (int64_t d = 0; d < q.width; ++d) mean_offset[d] += factor * weighted[d];
  }
}

// Calls row(i, args) for every scored row, see `combine`.
template <class T, class Row>
void forward_sweep(const Problem<T>& q, bool with_mean, const Row& row) {
  ForwardArgs<T> a{};
  a.problem = q;
  a.with_mean = with_mean;
  void (*kernel)(const ForwardArgs<T>&) = forward<T>;
  int64_t block = BLOCK;
#ifdef FASTREC_BF16
  if constexpr (sizeof(T) == 4) {
    if (q.bf16 == Bf16::dot) kernel = bf16::forward<bf16::Dot>, block = bf16::BLOCK;
    if (q.bf16 == Bf16::tiles) kernel = bf16::forward<bf16::Tiles>, block = bf16::BLOCK;
  }
#endif
  plan(a, block);
  int64_t partials = a.ranges * q.rows;
  Buffer<T> top(partials), weighted(with_mean ? partials * q.width : 0), logit(q.rows);
  Buffer<double> sum(partials);
  a.top = top, a.sum = sum, a.weighted = weighted, a.target_logit = logit;
  run(a, a.blocks * a.ranges, kernel);
  parallel_for(0, q.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i, a);
  });
}

// What becomes of the gradients is in `a`; `lse` is taken by value because it is made finite.
template <class T>
void backward_sweep(const Problem<T>& q, std::vector<T> lse, const T* grad_lse,
                    const T* grad_target_logit, BackwardArgs<T> a) {
  for (T& value : lse) value = finite_shift(value);
  std::vector<OneHot> one_hot(q.rows);
  for (int64_t i = 0; i < q.rows; ++i) one_hot[i] = {q.target[i], i};
  std::sort(one_hot.begin(), one_hot.end());

  a.problem = q;
  a.shift = lse.data(), a.grad_lse = grad_lse, a.grad_target_logit = grad_target_logit;
  a.one_hot = one_hot.data();
  auto sweep = [&](int64_t block, void (*kernel)(const BackwardArgs<T>&)) {
    a.block = q.items < 32 * block ? block / 2 : block;  // few items: more tasks to share
    a.blocks = divide_up(q.items, a.block);
    run(a, a.blocks, kernel);
  };
#ifdef FASTREC_BF16
  if constexpr (sizeof(T) == 4) {
    auto in_pairs = [&](auto products) {
      using P = decltype(products);
      typename P::Streamed x(q.rows, q.width);
      bf16::load_all<P>(q, x);
      a.rows_in_pairs = &x;
      sweep(bf16::BLOCK, bf16::backward<P>);
    };
    if (q.bf16 == Bf16::dot) return in_pairs(bf16::Dot());
    if (q.bf16 == Bf16::tiles) return in_pairs(bf16::Tiles());
  }
#endif
  sweep(BLOCK, backward<T>);
}

// Losses lse - target_logit of the scored rows, and for the gradients grad_row of them the gradients
// of x [N, ld], of the table [V, D] and of the bias [V]; null for those that are not wanted.
template <class T>
void stored_chunks(const Problem<T>& q, const T* grad_row, double* loss, T* grad_x,
                   T* grad_weight, T* grad_bias) {
  StoredArgs<T> a{};
  a.problem = q;
  // The tile shares the caches with the table and its gradient: fewer rows for more items.
  int64_t chunk = a.chunk = q.items * BLOCK * sizeof(T) <= 2 << 20 ? BLOCK : STORED_CHUNKS[1];
  a.tile = q.items < 32 * TILE ? TILE / 4 : TILE;  // few items: more tasks to share
  a.tiles = divide_up(q.items, a.tile);
  a.range = std::max<int64_t>(1, divide_up(a.tiles, 16));
  a.ranges = divide_up(a.tiles, a.range);
  int64_t chunks = divide_up(q.rows, chunk);  // of equal size, in whole register tiles
  int64_t step = chunks ? std::min(chunk, round_up(divide_up(q.rows, chunks), 12)) : 1;
  Buffer<T> packed(q.width * (chunk + 32)), stored(q.items * chunk), top(a.tiles * chunk);
  Buffer<T> sum(a.tiles * chunk), row_top(chunk), row_scale(chunk), logit(chunk);
  Buffer<T> partial(grad_x ? a.ranges * (chunk + 12) * q.ld : 0);
  a.packed = packed, a.stored = stored, a.top = top, a.sum = sum, a.partial = partial;
  a.row_top = row_top, a.row_scale = row_scale, a.target_logit = logit;
  a.loss = loss, a.grad_row = grad_row;
  a.grad_x = grad_x, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
  const bool learns = grad_x || grad_weight || grad_bias;
  std::vector<Phase> phases(5 * divide_up(q.rows, step));
  int64_t workers = std::min<int64_t>(a.tiles, torch::stable::get_num_threads());
  parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Phase* phase = phases.data();
    for (int64_t first = 0; first < q.rows; first += step) {
      StoredArgs<T> mine = a;
      mine.first = first, mine.rows = std::min(step, q.rows - first);
      auto tasks = [&](void (*worker)(const StoredArgs<T>&)) {
        mine.next = &phase->next;
        phase++->share([&] { worker(mine); });
      };
      phase++->once([&] { begin_chunk(mine); });
      tasks(score<T>);
      phase++->once([&] { end_score(mine); });
      if (!learns) continue;
      tasks(spread<T>);
      phase++->once([&] { end_spread(mine); });
    }
  });
}

}  // namespace
}  // namespace fastrec
