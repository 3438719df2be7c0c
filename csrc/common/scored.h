// SPDX-License-Identifier: Apache-2.0
// The tensors of a linear_cross_entropy problem as pointers, and workers that share its tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "arguments.h"
#include "linear_cross_entropy.h"

namespace fastrec {
namespace {

// Workers draw tasks from a counter: tasks own their outputs, so the order does not matter, and a
// worker that is slowed down by other processes takes fewer.
template <class Args>
void run(Args& args, int64_t tasks, void (*worker)(const Args&)) {
  std::atomic<int64_t> next{0};
  args.next = &next;
  int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  parallel_for(0, workers, 1, [&](int64_t, int64_t) { worker(args); });
}

// Tasks that the tasks of the next phase wait for. Many phases share one parallel region: to wake its
// threads takes 80 us, which is a tenth of a short phase (docs/log/neighbours.md).
struct alignas(64) Phase {
  std::atomic<int64_t> next{0}, inside{0};

  // `work` draws tasks from `next` until there are none. Then this worker waits for those that are
  // inside, since no other holds a task: one that comes late finds none, and one that never comes
  // is not waited for. After a while the processor is left to whoever else wants it. One whose `work`
  // throws is not inside either: the others go on with what there is, and the call ends in its error.
  template <class Work>
  void share(const Work& work) {
    ++inside;
    {
      struct Leave {
        std::atomic<int64_t>& inside;
        ~Leave() { --inside; }
      } leave{inside};
      work();
    }
    for (int turn = 0; inside.load() != 0; ++turn) {
      if (turn > 1000) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

  template <class Work>
  void once(const Work& work) {
    share([&] {
      if (next.fetch_add(1) == 0) work();
    });
  }
};

// The tensors of a problem, without the rows that are not scored.
template <class T>
struct Scored {
  Scored(const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias,
         const Tensor& target, int64_t ignore_index = -1)
      : weight(linear_weight) {
    Tensor ids = torch::stable::contiguous(target);
    const int64_t* y = int64_data(ids);
    int64_t items = linear_weight.size(0), width = linear_weight.size(1);
    check_size("input", input, {input.size(0), width});
    check_size("target", target, {input.size(0)});
    check_size("linear_bias", linear_bias, {items});
    for (int64_t i = 0; i < input.size(0); ++i) {
      if (y[i] == ignore_index) continue;
      STD_TORCH_CHECK(y[i] >= 0 && y[i] < items, "target ", y[i], " is outside [0, ", items, ")");
      row.push_back(i);
      item.push_back(y[i]);
    }
    int64_t count = static_cast<int64_t>(row.size()), ld = padded<T>(width);
    x = std::make_unique<Buffer<T>>((count + AFTER) * ld);
    load_rows<T>(Matrix(input).rows, count, row.data(), width, ld, *x);
    if (linear_bias)
      bias = torch::stable::contiguous(torch::stable::to(*linear_bias, compute_dtype<T>()));
    problem = {count, items, width, ld, *x, item.data(), weight.rows,
               bias ? data<T>(*bias) : nullptr,
               input.scalar_type() == ScalarType::BFloat16 ? bf16_products() : Bf16::none};
  }

  Matrix weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> row, item;
  std::unique_ptr<Buffer<T>> x;
  Problem<T> problem;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastrec
