// sum += dzᵀ x with bfloat16 factors and float32 sums, for the gradient of the last layer's weight.
// torch's product of bfloat16 matrices would round the share of each block to bfloat16.
//
// vdpbf16ps multiplies pairs of rows: a lane holds two numbers of one column, one below the other,
// and both products go to the lane's float32. So x and dz are packed in pairs of rows; an odd last
// row is paired with zeros. Where the processor has matrix units (AMX), these take the pairs.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CUSTOM_OPS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CUSTOM_OPS_AMX __attribute__((target("avx512f,avx512bw,amx-tile,amx-bf16")))
#endif
#endif

namespace custom_ops {

#ifdef CUSTOM_OPS_BF16

constexpr int64_t LANES = 16;   // float32 sums in a vector
constexpr int64_t TILE = 4;     // classes, and vectors of features, whose sums stay in registers
constexpr int64_t PANEL = 16;   // classes that are packed together

inline bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }

inline uint32_t pair(uint16_t upper, uint16_t lower) { return upper | uint32_t(lower) << 16; }

// Columns first … first + n − 1 of two rows (the second may be null), in pairs.
inline void pack_pairs(const uint16_t* upper, const uint16_t* lower, int64_t n, uint32_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = pair(upper[i], lower ? lower[i] : uint16_t(0));
}

// sums[c][·] += Σ_k a[k][c] · b[k][·] for `classes` ≤ TILE classes and V vectors of features.
template <int V>
CUSTOM_OPS_BF16 inline void add_tile(const uint32_t* a, const uint32_t* b, int64_t b_step,
                                     int64_t pairs, float* sums, int64_t features, int64_t classes,
                                     int64_t columns) {
  __m512 s[TILE][V];
  for (int c = 0; c < TILE; ++c) {
    for (int v = 0; v < V; ++v) s[c][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = (__m512bh)_mm512_loadu_si512(b + k * b_step + v * LANES);
    }
    for (int c = 0; c < TILE; ++c) {
      const __m512bh d = (__m512bh)_mm512_set1_epi32(int(a[k * PANEL + c]));
      for (int v = 0; v < V; ++v) s[c][v] = _mm512_dpbf16_ps(s[c][v], x[v], d);
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int v = 0; v < V; ++v) {
      const int64_t left = std::min(columns - v * LANES, LANES);
      const __mmask16 mask = __mmask16((1u << left) - 1);
      float* at = sums + c * features + v * LANES;
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), s[c][v]));
    }
  }
}

// `add_product`, by vectors whatever the processor has.
inline void add_product_by_vectors(const at::Tensor& sum, const at::Tensor& dz,
                                   const at::Tensor& x) {
  const int64_t rows = dz.size(0), classes = dz.size(1), features = x.size(1);
  const int64_t pairs = (rows + 1) / 2, width = (features + LANES - 1) / LANES * LANES;
  const auto* g = static_cast<const uint16_t*>(dz.const_data_ptr());
  const auto* h = static_cast<const uint16_t*>(x.const_data_ptr());
  float* sums = sum.mutable_data_ptr<float>();
  std::vector<uint32_t> b(pairs * width);
  for (int64_t k = 0; k < pairs; ++k) {
    const uint16_t* upper = h + 2 * k * features;
    pack_pairs(upper, 2 * k + 1 < rows ? upper + features : nullptr, features, &b[k * width]);
  }
  const int64_t panels = (classes + PANEL - 1) / PANEL;
  at::parallel_for(0, panels, 8, [&](int64_t panel, int64_t end) {
    std::vector<uint32_t> a(pairs * PANEL);
    for (; panel < end; ++panel) {
      const int64_t first = panel * PANEL, n = std::min(PANEL, classes - first);
      for (int64_t k = 0; k < pairs; ++k) {
        const uint16_t* upper = g + 2 * k * classes + first;
        pack_pairs(upper, 2 * k + 1 < rows ? upper + classes : nullptr, n, &a[k * PANEL]);
      }
      for (int64_t d = 0; d < width; d += TILE * LANES) {
        for (int64_t c = 0; c < n; c += TILE) {
          const auto add = [&](auto tile) {
            tile(&a[c], &b[d], width, pairs, sums + (first + c) * features + d, features,
                 std::min(TILE, n - c), features - d);
          };
          switch (std::min(TILE, (width - d) / LANES)) {
            case 4: add(add_tile<4>); break;
            case 3: add(add_tile<3>); break;
            case 2: add(add_tile<2>); break;
            default: add(add_tile<1>);
          }
        }
      }
    }
  });
}

#ifdef CUSTOM_OPS_AMX

constexpr int64_t SIDE = 16;         // rows of a matrix unit's tile, and 4-byte columns
constexpr int64_t SQUARE = 2 * SIDE;  // classes, and features, whose sums stay in four tiles

// Whether there are matrix units, and the system lets this process use their registers: asked at
// the first product, as the leave is the whole process's.
inline bool has_matrix_units() {
  static const bool found = [] {
    constexpr unsigned BF16 = 1u << 22, TILE_REGISTERS = 1u << 24;  // of CPUID's leaf 7, edx
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;                // of arch_prctl
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool there = (d & BF16) && (d & TILE_REGISTERS);
    return there && has_bf16_products() && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return found;
}

// to[i][j] = Σ_k a[i][k] · b[k][j] for SQUARE × SQUARE sums, over pairs of rows.
CUSTOM_OPS_AMX inline void multiply_square(const uint32_t* a, const uint32_t* b, int64_t b_step,
                                           int64_t pairs, float* to) {
  const int64_t a_bytes = 4 * pairs, b_bytes = 4 * b_step, to_bytes = 4 * SQUARE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < pairs; k += SIDE) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + SIDE * pairs + k, a_bytes);
    _tile_loadd(6, b + k * b_step, b_bytes);
    _tile_loadd(7, b + k * b_step + SIDE, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_bytes);
  _tile_stored(1, to + SIDE, to_bytes);
  _tile_stored(2, to + SIDE * SQUARE, to_bytes);
  _tile_stored(3, to + SIDE * SQUARE + SIDE, to_bytes);
}

// Columns first … first + n − 1 of dz in pairs of rows, a column after the other; the rest stays 0.
inline void pack_columns(const uint16_t* dz, int64_t rows, int64_t classes, int64_t first,
                         int64_t n, int64_t pairs, uint32_t* to) {
  for (int64_t k = 0; 2 * k < rows; ++k) {
    const uint16_t* upper = dz + 2 * k * classes + first;
    const uint16_t* lower = 2 * k + 1 < rows ? upper + classes : nullptr;
    for (int64_t i = 0; i < n; ++i) {
      to[i * pairs + k] = pair(upper[i], lower ? lower[i] : uint16_t(0));
    }
  }
}

// The registers' shapes, for the thread that works with them.
struct TileRegisters {
  CUSTOM_OPS_AMX TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int t = 0; t < 8; ++t) shapes.bytes[t] = 4 * SIDE, shapes.rows[t] = SIDE;
    // GCC takes the intrinsic to read the first eight bytes alone
    asm volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  CUSTOM_OPS_AMX ~TileRegisters() { _tile_release(); }
};

inline void add_product_by_matrices(const at::Tensor& sum, const at::Tensor& dz,
                                    const at::Tensor& x) {
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t rows = dz.size(0), classes = dz.size(1), features = x.size(1);
  const int64_t pairs = up((rows + 1) / 2, SIDE), width = up(features, SQUARE);
  const auto* g = static_cast<const uint16_t*>(dz.const_data_ptr());
  const auto* h = static_cast<const uint16_t*>(x.const_data_ptr());
  float* sums = sum.mutable_data_ptr<float>();
  std::vector<uint32_t> b(pairs * width);
  for (int64_t k = 0; 2 * k < rows; ++k) {
    const uint16_t* upper = h + 2 * k * features;
    pack_pairs(upper, 2 * k + 1 < rows ? upper + features : nullptr, features, &b[k * width]);
  }
  at::parallel_for(0, up(classes, SQUARE) / SQUARE, 4, [&](int64_t panel, int64_t end) {
    const TileRegisters registers;
    std::vector<uint32_t> a(SQUARE * pairs);
    std::vector<float> square(SQUARE * SQUARE);
    for (; panel < end; ++panel) {
      const int64_t first = panel * SQUARE, n = std::min(SQUARE, classes - first);
      if (n < SQUARE) std::fill(a.begin(), a.end(), 0u);
      pack_columns(g, rows, classes, first, n, pairs, a.data());
      for (int64_t d = 0; d < width; d += SQUARE) {
        multiply_square(a.data(), &b[d], width, pairs, square.data());
        for (int64_t c = 0; c < n; ++c) {
          float* to = sums + (first + c) * features + d;
          const int64_t columns = std::min(SQUARE, features - d);
          for (int64_t j = 0; j < columns; ++j) to[j] += square[c * SQUARE + j];
        }
      }
    }
  });
}

#else

inline bool has_matrix_units() { return false; }
inline void add_product_by_matrices(const at::Tensor&, const at::Tensor&, const at::Tensor&) {}

#endif

// sum (classes, features) += dzᵀ x for dz (rows, classes) and x (rows, features), all contiguous.
inline void add_product(const at::Tensor& sum, const at::Tensor& dz, const at::Tensor& x) {
  if (has_matrix_units()) {
    add_product_by_matrices(sum, dz, x);
  } else {
    add_product_by_vectors(sum, dz, x);
  }
}

#else

inline bool has_bf16_products() { return false; }
inline void add_product(const at::Tensor&, const at::Tensor&, const at::Tensor&) {}
inline void add_product_by_vectors(const at::Tensor&, const at::Tensor&, const at::Tensor&) {}

#endif

}  // namespace custom_ops
