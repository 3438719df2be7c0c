// SPDX-License-Identifier: Apache-2.0
// What a kernel takes for granted of a tensor, for those who call torch.ops.fastrec past the Python
// functions: those name the argument and say more. Included after TORCH_TARGET_VERSION.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace fastrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<T>::value;
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "expected ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline const int64_t* int64_data(const Tensor& tensor) { return data<int64_t>(tensor); }

inline const int64_t* int64_data(const std::optional<Tensor>& tensor) {
  return data_or_null<int64_t>(tensor);
}

inline void check_size(const char* name, const Tensor& tensor,
                       std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && tensor.size(d++) == size;
  if (same) return;
  std::string expected, got;
  for (int64_t size : sizes) expected += " " + std::to_string(size);
  for (d = 0; d < tensor.dim(); ++d) got += " " + std::to_string(tensor.size(d));
  STD_TORCH_CHECK(false, name, " must have the sizes", expected, ", got", got);
}

inline void check_size(const char* name, const std::optional<Tensor>& tensor,
                       std::initializer_list<int64_t> sizes) {
  if (tensor) check_size(name, *tensor, sizes);
}

// Offsets are walked as pointers. Events behind the last one belong to no sequence.
inline void check_offsets(const int64_t* at, int64_t sequences, int64_t events) {
  STD_TORCH_CHECK(sequences >= 0, "offsets must not be empty");
  STD_TORCH_CHECK(at[0] == 0, "offsets must start at 0, got ", at[0]);
  for (int64_t b = 0; b < sequences; ++b)
    STD_TORCH_CHECK(at[b] <= at[b + 1] && at[b + 1] <= events, "offsets must rise from 0 to ",
                    events, ", got ", at[b], ", ", at[b + 1]);
}

}  // namespace
}  // namespace fastrec
