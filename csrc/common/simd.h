// SPDX-License-Identifier: Apache-2.0
// Vectors of a fixed width, their exponential, and the choice of an instruction set at run time.
//
// A kernel is a template over `Simd<T, BYTES>` in which everything is FASTREC_INLINE. It is
// instantiated inside one function per instruction set (FASTREC_DEFINE_PER_ISA), so that a single
// source gives AVX-512, AVX2 and baseline code in one portable binary.
#pragma once

#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ < 12
#error "the C++ kernels need g++ 12 or later; FASTREC_NO_EXTENSION=1 installs without them"
#endif

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "the C++ kernels need IEEE arithmetic: build them without -ffast-math"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define FASTREC_INLINE inline __attribute__((always_inline))

namespace fastrec {

template <class T>
struct ExpConstants;

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2. Adding `magic` rounds to an integer and
// leaves n + bias, the exponent bits of 2^n, in the low bits of the sum. ln 2 is subtracted in two
// parts, so r is exact to rounding.
template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23;
  static constexpr float magic = 12582912.0f + 127;  // 1.5 * 2^23 + bias
  static constexpr float log2e = 1.44269504089f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float smallest = -87.33654f;  // below it the result would not be normal
  // Least-squares fit weighted for the relative error (4e-9), with exp(0) = 1 exactly.
  static constexpr float poly[] = {1.0f,           1.0f,            0.4999998856f, 0.1666651817f,
                                   0.04166953869f, 0.008368951777f, 0.001375127911f};
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0 + 1023;  // 1.5 * 2^52 + bias
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 0.693147180369123816490,
                          ln2_lo = 1.90821492927058770002e-10;
  static constexpr double smallest = -708.39641853226408;
  // Taylor to degree 13: the first dropped term is (ln(2)/2)^14 / 14! = 4e-18.
  static constexpr double poly[] = {1.0,           1.0,           1.0 / 2,        1.0 / 6,
                                    1.0 / 24,      1.0 / 120,     1.0 / 720,      1.0 / 5040,
                                    1.0 / 40320,   1.0 / 362880,  1.0 / 3628800,  1.0 / 39916800,
                                    1.0 / 479001600, 1.0 / 6227020800};
};

template <class T_, int BYTES>
struct Simd {
  using T = T_;
  using C = ExpConstants<T>;
  typedef T V __attribute__((vector_size(BYTES)));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
  typedef typename C::Bits I __attribute__((vector_size(BYTES)));
  typedef std::make_unsigned_t<typename C::Bits> U __attribute__((vector_size(BYTES)));
  static constexpr int lanes = BYTES / sizeof(T);

  static FASTREC_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static FASTREC_INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static FASTREC_INLINE V max(V a, V b) { return a > b ? a : b; }

  // For x <= 0 (a softmax never needs more). exp(-inf) = 0; results below the smallest normal
  // number are 0. NaN stays NaN: it fails the comparison, and y is multiplied by 2^n. (To add n to
  // the exponent of y made numbers of NaNs whose low bits are set.) Several vectors step by step:
  // one is a chain of a dozen dependent operations, and the schedulers see only a few chains ahead.
  template <int N>
  static FASTREC_INLINE void exp(V (&x)[N]) {
    constexpr int degree = sizeof(C::poly) / sizeof(T) - 1;
    V shifted[N], y[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) shifted[i] = x[i] * C::log2e + C::magic;
    I small[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) small[i] = x[i] < C::smallest;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = x[i] - (shifted[i] - C::magic) * C::ln2_hi;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = x[i] - (shifted[i] - C::magic) * C::ln2_lo;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) y[i] = x[i] * C::poly[degree] + C::poly[degree - 1];
#pragma GCC unroll 16
    for (int d = degree - 2; d >= 0; --d) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) y[i] = y[i] * x[i] + C::poly[d];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      x[i] = small[i] ? V{} : y[i] * (V)((U)shifted[i] << C::mantissa);
  }
};

}  // namespace fastrec

#if defined(__x86_64__)
#define FASTREC_TARGET(isa) __attribute__((target(isa)))
namespace fastrec {
// Width in bytes of the widest vectors this processor and its operating system support.
inline int widest_vector_bytes() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 64;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32 : 16;
}
}  // namespace fastrec

// Defines `template <class T> void name(const Arguments<T>&)`, which runs body<Simd<T, BYTES>>.
#define FASTREC_DEFINE_PER_ISA(name, Arguments, body)                                      \
  template <class T>                                                                       \
  FASTREC_TARGET("arch=x86-64-v4") void name##_v4(const Arguments<T>& a) {                 \
    body<Simd<T, 64>>(a);                                                                  \
  }                                                                                        \
  template <class T>                                                                       \
  FASTREC_TARGET("arch=x86-64-v3") void name##_v3(const Arguments<T>& a) {                 \
    body<Simd<T, 32>>(a);                                                                  \
  }                                                                                        \
  template <class T>                                                                       \
  void name##_v1(const Arguments<T>& a) {                                                  \
    body<Simd<T, 16>>(a);                                                                  \
  }                                                                                        \
  template <class T>                                                                       \
  void name(const Arguments<T>& a) {                                                       \
    const int bytes = vector_bytes();                                                      \
    bytes == 64 ? name##_v4(a) : bytes == 32 ? name##_v3(a) : name##_v1(a);                \
  }
#else
#define FASTREC_DEFINE_PER_ISA(name, Arguments, body) \
  template <class T>                                  \
  void name(const Arguments<T>& a) {                  \
    body<Simd<T, 16>>(a);                             \
  }
namespace fastrec {
inline int widest_vector_bytes() { return 16; }
}  // namespace fastrec
#endif

namespace fastrec {
// What FASTREC_CPU_CAPABILITY says, as ATEN_CPU_CAPABILITY does for PyTorch: for tests and
// comparisons. 64 if it is not set, 0 if it is none of the names. `bf16_products` reads it too.
inline int asked_vector_bytes() {
  const char* name = std::getenv("FASTREC_CPU_CAPABILITY");
  if (name == nullptr || *name == 0) return 64;
  for (const char* wide : {"amx", "avx512_bf16", "avx512"})
    if (std::strcmp(name, wide) == 0) return 64;
  return std::strcmp(name, "avx2") == 0 ? 32 : std::strcmp(name, "default") == 0 ? 16 : 0;
}
// Of the vectors that the kernels use in this process.
inline int vector_bytes() {
  static const int bytes = std::min(widest_vector_bytes(), asked_vector_bytes());
  return bytes;
}
}  // namespace fastrec
