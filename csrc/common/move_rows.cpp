// SPDX-License-Identifier: Apache-2.0
// CPU kernel of fastrec::move_rows_: a row-wise optimizer on some rows of a table.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "row_update.h"

namespace fastrec {
namespace {

template <class T>
struct MoveArgs {
  RowConstants<T> how;
  int64_t first, last, width, step;  // rows [first, last); numbers a row in `square`
  const int64_t* rows;
  const T* grad;                 // [U, D]
  T *table, *square, *mean;      // [V, D], [V] or like the table or null, like the table or null
  T rate;
};

constexpr int64_t AHEAD = 6;  // rows: what comes from memory is on its way before it is asked for

template <class S, class T = typename S::T>
FASTREC_INLINE void move_body(const MoveArgs<T>& a) {
  auto fetch = [](T* row, int64_t count) __attribute__((always_inline)) {
    if (!row) return;
    for (int64_t d = 0; d < count; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 1);
  };
  for (int64_t i = a.first; i < a.last; ++i) {
    if (i + AHEAD < a.last) {
      const int64_t next = a.rows[i + AHEAD];
      fetch(a.table + next * a.width, a.width);
      fetch(a.square ? a.square + next * a.step : nullptr, a.step);
      fetch(a.mean ? a.mean + next * a.width : nullptr, a.width);
    }
    const int64_t row = a.rows[i];
    update_row(a.how, a.width, a.grad + i * a.width, a.table + row * a.width,
               a.square ? a.square + row * a.step : nullptr,
               a.mean ? a.mean + row * a.width : nullptr, a.rate);
  }
}
FASTREC_DEFINE_PER_ISA(move, MoveArgs, move_body)

void move_rows_(Tensor table, Tensor rows, Tensor grad, std::optional<Tensor> square,
                std::optional<Tensor> mean, double rate, double eps, double first, double second) {
  Tensor ids = torch::stable::contiguous(rows), from = torch::stable::contiguous(grad);
  const int64_t* at = int64_data(ids);
  const int64_t count = rows.size(0), items = table.size(0);
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < items && (i == 0 || at[i - 1] < at[i]),
                    "rows must be ascending, different and in [0, ", items, "), got ", at[i]);
  const int64_t width = table.dim() == 2 ? table.size(1) : 1;
  if (table.dim() == 2)
    check_size("grad", grad, {count, width});
  else
    check_size("grad", grad, {count});
  for (const std::optional<Tensor>& part : {std::optional<Tensor>(table), square, mean})
    STD_TORCH_CHECK(!part || part->is_contiguous(), "what is updated must be contiguous");
  STD_TORCH_CHECK(!square || square->numel() == (mean ? items * width : items),
                  "square must have a number for each ", mean ? "number" : "row", " of the table");
  STD_TORCH_CHECK(!mean || mean->numel() == items * width, "mean must be like the table");
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    MoveArgs<T> a{{T(eps), T(first), T(second)},
                  0, 0, width, mean ? width : 1,
                  at, data<T>(from), data<T>(table),
                  data_or_null<T>(square), data_or_null<T>(mean), T(rate)};
    parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
      MoveArgs<T> part = a;
      part.first = begin, part.last = end;
      move<T>(part);
    });
  };
  table.scalar_type() == ScalarType::Double ? typed(0.0) : typed(0.0f);
}

}  // namespace
}  // namespace fastrec

STABLE_TORCH_LIBRARY_IMPL(fastrec, CPU, m) {
  m.impl("move_rows_", TORCH_BOX(&fastrec::move_rows_));
}
