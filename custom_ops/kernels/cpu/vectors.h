// What a kernel does to a run of numbers: read as acc_t, reduce, map, write.
//
// acc_t is float or double, in which everything is computed; the half types are widened in the
// cache, CHUNK elements at a time, and rounded once when they are written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <limits>

namespace custom_ops {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Elements of one step along the classes: a few such runs fit in the first-level cache together.
constexpr int64_t CHUNK = 2048;

template <typename T>
constexpr T INF = std::numeric_limits<T>::infinity();

// Calls f(i, count) for every vector of 0 … n − 1; count is short only in the last.
template <typename T, typename F>
inline void each_vector(int64_t n, F f) {
  constexpr int64_t width = Vec<T>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i, width);
  if (i < n) f(i, n - i);
}

// Joins term(i, count) over 0 … n − 1. Four independent sums hide the latency of an addition, and
// round off less than one.
template <typename T, typename Term, typename Join>
inline T reduce(int64_t n, T empty, Term term, Join join) {
  constexpr int64_t width = Vec<T>::size();
  Vec<T> a0(empty), a1(empty), a2(empty), a3(empty);
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    a0 = join(a0, term(i, width));
    a1 = join(a1, term(i + width, width));
    a2 = join(a2, term(i + 2 * width, width));
    a3 = join(a3, term(i + 3 * width, width));
  }
  for (; i + width <= n; i += width) a0 = join(a0, term(i, width));
  if (i < n) a1 = Vec<T>::set(a1, join(a1, term(i, n - i)), n - i);
  return at::vec::vec_reduce_all<T>(join, join(join(a0, a1), join(a2, a3)));
}

template <typename T, typename Term>
inline T sum(int64_t n, Term term) {
  return reduce<T>(n, T(0), term, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// The larger of a and b; where one is NaN, either. A third of the work of a maximum that keeps NaN.
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

// The largest of z but for NaN, which may be passed over.
template <typename T>
inline T largest(const T* z, int64_t n) {
  return reduce<T>(
      n, -INF<T>, [z](int64_t i, int64_t count) { return Vec<T>::loadu(z + i, count); },
      [](Vec<T> a, Vec<T> b) { return larger(a, b); });
}

// y ⊙ x with 0 · ±inf = 0.
template <typename T>
inline Vec<T> product(Vec<T> y, Vec<T> x) {
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
    __builtin_prefetch(static_cast<const char*>(data) + offset * size, 0, 2);
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
