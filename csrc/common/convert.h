// SPDX-License-Identifier: Apache-2.0
// Rows of any floating dtype to and from the type that the kernels compute in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace fastrec {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The dtype of a tensor of T, the type that a kernel computes in.
template <class T>
constexpr ScalarType compute_dtype() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// A dtype that is none of the four: there is no other way to read an element, so nothing goes on.
[[noreturn]] __attribute__((cold, noinline)) inline void refuse(ScalarType dtype) {
  STD_TORCH_CHECK(false, "the kernels read and write float64, float32, bfloat16 and float16, got ",
                  torch::headeronly::toString(dtype));
  std::abort();  // not reached
}

// Bytes of an element. Whoever takes a tensor asks, before the threads start.
inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      refuse(dtype);
  }
}

// The conversions are written without branches so that the loops around them become vector code.
FASTREC_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
FASTREC_INLINE float widen(float value) { return value; }
FASTREC_INLINE double widen(double value) { return value; }
FASTREC_INLINE float widen(BFloat16 value) { return from_bits(uint32_t{value.x} << 16); }
FASTREC_INLINE float widen(Half value) {
  uint32_t magnitude = value.x & 0x7fffu;
  // Exponent bias 127 - 15 = 112; the multiplication also normalises subnormal halves.
  uint32_t bits;
  float scaled = from_bits(magnitude << 13) * 0x1p112f;
  std::memcpy(&bits, &scaled, sizeof(bits));
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN
  return from_bits(bits | uint32_t(value.x & 0x8000u) << 16);
}

template <class Source, class T>
FASTREC_INLINE void convert_row(const Source* __restrict source, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen(source[i]));
}

// A [rows, width] matrix with contiguous rows, of a dtype known at run time.
struct Rows {
  const char* data;
  int64_t stride;  // bytes from row to row
  ScalarType dtype;

  template <class T>
  FASTREC_INLINE void load(int64_t row, T* out, int64_t n) const {
    const char* source = data + row * stride;
    switch (dtype) {
      case ScalarType::Double:
        return convert_row(reinterpret_cast<const double*>(source), out, n);
      case ScalarType::Float:
        return convert_row(reinterpret_cast<const float*>(source), out, n);
      case ScalarType::BFloat16:
        return convert_row(reinterpret_cast<const BFloat16*>(source), out, n);
      case ScalarType::Half:
        return convert_row(reinterpret_cast<const Half*>(source), out, n);
      default:
        refuse(dtype);
    }
  }
};

template <class T, class Target>
FASTREC_INLINE void narrow_row(const T* __restrict values, Target* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Target>(values[i]);
}

template <class T>
FASTREC_INLINE void store_row(const T* values, void* out, ScalarType dtype, int64_t at, int64_t n) {
  switch (dtype) {
    case ScalarType::Double:
      return narrow_row(values, static_cast<double*>(out) + at, n);
    case ScalarType::Float:
      return narrow_row(values, static_cast<float*>(out) + at, n);
    case ScalarType::BFloat16:
      return narrow_row(values, static_cast<BFloat16*>(out) + at, n);
    case ScalarType::Half:
      return narrow_row(values, static_cast<Half*>(out) + at, n);
    default:
      refuse(dtype);
  }
}

}  // namespace fastrec
