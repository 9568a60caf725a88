// What a kernel does to a run of numbers: read as acc_t, reduce, map, write.
//
// acc_t is float or double, in which everything is computed; the half types are widened as they are
// read and rounded once when they are written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace custom_ops {

// For everything that is done to each vector, and for the loops around it. Otherwise the compiler
// calls a long lambda: its captures go through the stack, and reading them back stalls on the
// stores.
#define INLINE __attribute__((always_inline))

template <typename T>
using Vec = at::vec::Vectorized<T>;

// What numbers of type T are computed in.
template <typename T>
using acc_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr bool is_half = !std::is_same_v<T, acc_of<T>>;

// Elements of one step along the classes. A few such runs fit in the first-level cache.
constexpr int64_t CHUNK = 2048;

template <typename T>
constexpr T INF = std::numeric_limits<T>::infinity();

// Calls f(i, count) for every vector of 0 … n − 1; count is short only in the last.
template <typename T, typename F>
inline INLINE void each_vector(int64_t n, F f) {
  constexpr int64_t width = Vec<T>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i, width);
  if (i < n) f(i, n - i);
}

// A vector of numbers that lie in memory as T.
template <typename T>
inline INLINE Vec<acc_of<T>> load(const T* from, int64_t count) {
  if constexpr (is_half<T>) {
    Vec<float> x;
    if (count == Vec<float>::size()) {
      at::vec::load_to_float<T>(from, x);
    } else {
      x = std::get<0>(at::vec::convert_to_float<T>(Vec<T>::loadu(from, count)));
    }
    return x;
  } else {
    return Vec<T>::loadu(from, count);
  }
}

// to[i] = f(i, count) for every vector of 0 … n − 1, each rounded to T once. Where `to` is what f
// reads, it is read before it is written.
template <typename T, typename F>
inline INLINE void fill(T* to, int64_t n, F f) {
  if constexpr (is_half<T>) {
    constexpr int64_t width = Vec<float>::size();
    Vec<float> both[2];
    int64_t i = 0;
    for (; i + 2 * width <= n; i += 2 * width) {
      for (int64_t j = 0; j < 2; ++j) both[j] = f(i + j * width, width);
      at::vec::convert_from_float<T>(both[0], both[1]).store(to + i);
    }
    if (i == n) return;
    for (int64_t j = 0; j < 2 && i + j * width < n; ++j) {
      both[j] = f(i + j * width, std::min(width, n - i - j * width));
    }
    at::vec::convert_from_float<T>(both[0], both[1]).store(to + i, n - i);
  } else {
    each_vector<T>(n, [=](int64_t i, int64_t count) INLINE {
      f(i, count).store(to + i, count);
    });
  }
}

// x ⊙ y, as the term of a sum, which adds it in one rounding.
template <typename T>
struct Times {
  Vec<T> x, y;
};

struct Plus {
  template <typename T>
  INLINE Vec<T> operator()(Vec<T> a, Vec<T> b) const {
    return a + b;
  }
  template <typename T>
  INLINE Vec<T> operator()(Vec<T> a, Times<T> b) const {
    return at::vec::fmadd(b.x, b.y, a);
  }
};

// Joins term(i, count) over 0 … n − 1. Four independent sums hide the latency of an addition, and
// round off less than one.
template <typename T, typename Term, typename Join>
inline INLINE T reduce(int64_t n, T empty, Term term, Join join) {
  constexpr int64_t width = Vec<T>::size();
  Vec<T> a[4] = {Vec<T>(empty), Vec<T>(empty), Vec<T>(empty), Vec<T>(empty)};
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for (int64_t j = 0; j < 4; ++j) a[j] = join(a[j], term(i + j * width, width));
  }
  for (; i < n; i += width) {
    const int64_t count = std::min(width, n - i);
    a[0] = Vec<T>::set(a[0], join(a[0], term(i, count)), count);
  }
  return at::vec::vec_reduce_all<T>(join, join(join(a[0], a[1]), join(a[2], a[3])));
}

template <typename T, typename Term>
inline INLINE T sum(int64_t n, Term term) {
  return reduce<T>(n, T(0), term, Plus());
}

// The larger of a and b, or either if one is NaN. One instruction; a maximum that keeps NaN takes
// three.
template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_max_ps(a, b);
  if constexpr (std::is_same_v<T, double>) return _mm512_max_pd(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_max_ps(a, b);
  if constexpr (std::is_same_v<T, double>) return _mm256_max_pd(a, b);
#endif
  return at::vec::maximum(a, b);
}

// The largest of z(i, count). NaN may be passed over.
template <typename T, typename Get>
inline INLINE T largest(int64_t n, Get z) {
  return reduce<T>(n, -INF<T>, z, [](Vec<T> a, Vec<T> b) { return larger(a, b); });
}

// y ⊙ x with 0 · ±inf = 0.
template <typename T>
inline INLINE Vec<T> product(Vec<T> y, Vec<T> x) {
#ifdef CPU_CAPABILITY_AVX512
  constexpr int infinite = 0x18;  // of either sign
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 zero = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_maskz_mul_ps(~_mm512_mask_fpclass_ps_mask(zero, x, infinite), y, x);
  }
  if constexpr (std::is_same_v<T, double>) {
    const __mmask8 zero = _mm512_cmp_pd_mask(y, _mm512_setzero_pd(), _CMP_EQ_OQ);
    return _mm512_maskz_mul_pd(~_mm512_mask_fpclass_pd_mask(zero, x, infinite), y, x);
  }
#endif
  const Vec<T> zero(0);
  const auto vanishes = (y == zero) & (x.abs() == Vec<T>(INF<T>));
  return Vec<T>::blendv(y * x, zero, vanishes);
}

template <typename T>
inline T product(T y, T x) {
  return y == 0 && std::isinf(x) ? T(0) : y * x;
}

template <typename half_t>
inline void widen(const half_t* from, float* to, int64_t n) {
  constexpr int64_t width = Vec<half_t>::size();
  each_vector<half_t>(n, [=](int64_t i, int64_t count) {
    auto [low, high] = at::vec::convert_to_float<half_t>(Vec<half_t>::loadu(from + i, count));
    low.store(to + i, std::min(count, width / 2));
    if (count > width / 2) high.store(to + i + width / 2, count - width / 2);
  });
}

template <typename half_t>
inline void narrow(const float* from, half_t* to, int64_t n) {
  constexpr int64_t width = Vec<half_t>::size();
  each_vector<half_t>(n, [=](int64_t i, int64_t count) {
    const auto low = Vec<float>::loadu(from + i, std::min(count, width / 2));
    const auto high = count > width / 2
        ? Vec<float>::loadu(from + i + width / 2, count - width / 2)
        : Vec<float>(0);
    at::vec::convert_from_float<half_t>(low, high).store(to + i, count);
  });
}

// Prefetches `at`, which need not be memory of ours. Always inlined: as a function without effects,
// the compiler would drop the call.
inline INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// to[c][r] = from[r][c] for r < rows, c < columns; rows begin `from_step` and `to_step` apart.
template <typename T>
inline void transpose(const T* from, int64_t from_step, int64_t rows, int64_t columns, T* to,
                      int64_t to_step) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    return at::vec::transpose_mxn<float>(from, from_step, to, to_step, static_cast<int>(rows),
                                         static_cast<int>(columns));
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_step + r] = from[r * from_step + c];
  }
}

// Numbers of any floating-point type that are read as acc_t.
template <typename acc_t>
struct Source {
  const void* data = nullptr;
  c10::ScalarType type = c10::CppTypeToScalarType<acc_t>::value;
  int64_t size = sizeof(acc_t);

  Source() = default;
  explicit Source(const at::Tensor& x)
      : data(x.const_data_ptr()),
        type(x.scalar_type()),
        size(static_cast<int64_t>(x.element_size())) {}

  explicit operator bool() const { return data != nullptr; }

  // Whether the numbers can be read where they are.
  bool direct() const { return type == c10::CppTypeToScalarType<acc_t>::value; }

  // The n numbers from `offset`: where they are, or widened in `buffer`.
  const acc_t* load(int64_t offset, int64_t n, acc_t* buffer) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (type == c10::kBFloat16) {
        widen(static_cast<const c10::BFloat16*>(data) + offset, buffer, n);
        return buffer;
      }
      if (type == c10::kHalf) {
        widen(static_cast<const c10::Half*>(data) + offset, buffer, n);
        return buffer;
      }
    }
    return static_cast<const acc_t*>(data) + offset;
  }

  // Asks for the run from `offset` ahead of its use, a line for every vector that is worked on.
  void prefetch(int64_t offset) const {
    custom_ops::prefetch(static_cast<const char*>(data) + offset * size);
  }

  acc_t operator[](int64_t offset) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (type == c10::kBFloat16) return static_cast<const c10::BFloat16*>(data)[offset];
      if (type == c10::kHalf) return static_cast<const c10::Half*>(data)[offset];
    }
    return static_cast<const acc_t*>(data)[offset];
  }
};

// Numbers of any floating-point type that are computed as acc_t.
template <typename acc_t>
struct Sink {
  void* data;
  c10::ScalarType type;

  explicit Sink(const at::Tensor& x) : data(x.mutable_data_ptr()), type(x.scalar_type()) {}

  bool direct() const { return type == c10::CppTypeToScalarType<acc_t>::value; }

  // Where the numbers from `offset` are to be computed: in place, or in `buffer`.
  acc_t* begin(int64_t offset, acc_t* buffer) const {
    return direct() ? static_cast<acc_t*>(data) + offset : buffer;
  }

  // Rounds what was computed in the buffer into its place.
  void end(const acc_t* computed, int64_t offset, int64_t n) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (type == c10::kBFloat16) {
        narrow(computed, static_cast<c10::BFloat16*>(data) + offset, n);
      } else if (type == c10::kHalf) {
        narrow(computed, static_cast<c10::Half*>(data) + offset, n);
      }
    }
  }

  void zero(int64_t offset, int64_t n) const {
    const auto size = static_cast<int64_t>(c10::elementSize(type));
    std::memset(static_cast<char*>(data) + offset * size, 0, n * size);
  }
};

}  // namespace custom_ops
