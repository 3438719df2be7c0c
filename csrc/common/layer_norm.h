// SPDX-License-Identifier: Apache-2.0
// LayerNorm of one row, forward and backward, in the type that the kernels compute in.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "simd.h"

namespace fastrec {

// Rows that a task owns. Fixed, because it decides the order in which weight gradients are added.
constexpr int64_t CHUNK = 128;

// Row i of a matrix in T: in place where the dtypes agree, else converted into `scratch`.
template <class T>
FASTREC_INLINE const T* row_of(const Rows& matrix, int64_t i, T* scratch, int64_t width) {
  if (matrix.dtype == compute_dtype<T>())
    return reinterpret_cast<const T*>(matrix.data + i * matrix.stride);
  matrix.load(i, scratch, width);
  return scratch;
}

// Where row i of a contiguous result is computed: in place, or in `scratch` before it is narrowed.
template <class T>
FASTREC_INLINE T* target_row(void* out, ScalarType dtype, int64_t i, T* scratch, int64_t width) {
  return dtype == compute_dtype<T>() ? static_cast<T*>(out) + i * width : scratch;
}
template <class T>
FASTREC_INLINE void finish_row(const T* row, void* out, ScalarType dtype, int64_t i,
                               int64_t width) {
  if (dtype != compute_dtype<T>()) store_row<T>(row, out, dtype, i * width, width);
}

template <class T>
FASTREC_INLINE void normalize_row(const T* z, const T* weight, const T* bias, T eps, int64_t width,
                                  T* __restrict out, T& mean, T& rstd) {
  T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += z[d];
  mean = sum / T(width);
  const T center = mean;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; ++d) square += (z[d] - center) * (z[d] - center);
  rstd = T(1) / std::sqrt(square / T(width) + eps);
  const T scale = rstd;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) out[d] = (z[d] - center) * scale * weight[d] + bias[d];
}

// grad_z = s (g - mean(g) - x mean(g x)) with g = grad weight; adds to the weight gradients.
template <class T>
FASTREC_INLINE void normalize_row_backward(const T* z, T mean, T rstd, const T* grad,
                                           const T* weight, int64_t width, T* __restrict grad_z,
                                           T* __restrict grad_weight, T* __restrict grad_bias) {
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t d = 0; d < width; ++d) {
    T x = (z[d] - mean) * rstd, g = grad[d] * weight[d];
    sum += g;
    along += g * x;
    grad_weight[d] += grad[d] * x;
    grad_bias[d] += grad[d];
  }
  sum /= T(width);
  along /= T(width);
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) {
    T x = (z[d] - mean) * rstd;
    grad_z[d] = rstd * (grad[d] * weight[d] - sum - x * along);
  }
}

// out[d] = sum over chunks of partials[c, d], in order.
template <class T>
void sum_chunks(const T* partials, int64_t chunks, int64_t stride, int64_t width, void* out,
                ScalarType dtype) {
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partials[c * stride + d];
    store_row<double>(&sum, out, dtype, d, 1);
  }
}

}  // namespace fastrec
