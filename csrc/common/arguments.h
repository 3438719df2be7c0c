// SPDX-License-Identifier: Apache-2.0
// Tensor arguments as the kernels see them: contiguous rows, vectors in the computing type, and the
// key of a dropout mask. The objects keep the memory alive.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "convert.h"
#include "dropout.h"
#include "parallel.h"

namespace fastrec {
namespace {

inline ScalarType promote(ScalarType a, ScalarType b) {
  bytes_of(a), bytes_of(b);
  if (a == b) return a;
  bool wide = a == ScalarType::Double || b == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;  // also of bfloat16 and float16
}

struct Matrix {
  explicit Matrix(const std::optional<Tensor>& matrix) {
    if (!matrix) return;
    STD_TORCH_CHECK(matrix->dim() == 2, "expected a matrix, got ", matrix->dim(), " dimensions");
    const int64_t size = bytes_of(matrix->scalar_type());
    bool rows_are = matrix->stride(1) == 1 || matrix->size(1) == 1;
    tensor = rows_are ? *matrix : torch::stable::contiguous(*matrix);
    rows = {static_cast<const char*>(tensor->data_ptr()),
            tensor->stride(0) * size, tensor->scalar_type()};
  }
  // The elements of a matrix that is read in place.
  template <class T>
  const T* elements() const {
    STD_TORCH_CHECK(rows.dtype == compute_dtype<T>(), "expected ",
                    torch::headeronly::toString(compute_dtype<T>()), ", got ",
                    torch::headeronly::toString(rows.dtype));
    return reinterpret_cast<const T*>(rows.data);
  }
  std::optional<Tensor> tensor;
  Rows rows{nullptr, 0, ScalarType::Float};  // data stays null for no matrix
};

// Rows of a matrix, those at `at` or the first `count`, as [count + AFTER, ld] of T with zeros beyond
// `width` and after the last: kernels read whole vectors, and register tiles of at most AFTER rows.
constexpr int64_t AFTER = 12;

template <class T>
void load_rows(const Rows& from, int64_t count, const int64_t* at, int64_t width, int64_t ld,
               T* out) {
  parallel_for(0, count + AFTER, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(out + i * ld, ld, T(0));
      if (i < count) from.load(at ? at[i] : i, out + i * ld, width);
    }
  });
}

template <class T>
class Vector {
 public:
  // n elements; `fill` where there is no vector.
  Vector(const std::optional<Tensor>& vector, int64_t n, T fill = T(0)) : filled_(vector ? 0 : n) {
    if (vector) {
      check_size("a vector", *vector, {n});
      bytes_of(vector->scalar_type());
      tensor_ = torch::stable::contiguous(torch::stable::to(*vector, compute_dtype<T>()));
    } else {
      std::fill_n(static_cast<T*>(filled_), n, fill);
    }
  }
  operator const T*() const {
    return tensor_ ? data<T>(*tensor_) : static_cast<T*>(filled_);
  }

 private:
  std::optional<Tensor> tensor_;
  Buffer<T> filled_;
};

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

inline const std::optional<Tensor>& checked_rng(const std::optional<Tensor>& rng) {
  check_size("rng", rng, {2});
  return rng;
}

struct DropoutTensors {
  DropoutTensors(const std::optional<Tensor>& keys_, const std::optional<Tensor>& positions_,
                 const std::optional<Tensor>& rng_, int64_t drop, int64_t site, int64_t layer)
      : keys(contiguous_or_none(keys_)),
        positions(contiguous_or_none(positions_)),
        rng(contiguous_or_none(checked_rng(rng_))),
        value{int64_data(keys), int64_data(positions),
              PhiloxKey(rng ? int64_data(rng)[0] : 0, rng ? int64_data(rng)[1] : 0,
                        static_cast<Site>(site), layer),
              drop} {
    STD_TORCH_CHECK(!drop || (keys && positions && rng), "dropout needs rng, keys and positions");
  }

  void check_rows(int64_t rows) const {
    check_size("keys", keys, {rows});
    check_size("positions", positions, {rows});
  }

  std::optional<Tensor> keys, positions, rng;
  Dropout value;
};

}  // namespace
}  // namespace fastrec
