// sum += dzᵀ x with bfloat16 factors and float32 sums, for the gradient of the last layer's weight.
// torch's product of bfloat16 matrices would round the share of each block to bfloat16.
//
// vdpbf16ps multiplies pairs of rows: a lane holds two numbers of one column, one below the other,
// and both products go to the lane's float32. So x and dz are packed in pairs of rows; an odd last
// row is paired with zeros.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CUSTOM_OPS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
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

// sum (classes, features) += dzᵀ x for dz (rows, classes) and x (rows, features), all contiguous.
inline void add_product(const at::Tensor& sum, const at::Tensor& dz, const at::Tensor& x) {
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

#else

inline bool has_bf16_products() { return false; }
inline void add_product(const at::Tensor&, const at::Tensor&, const at::Tensor&) {}

#endif

}  // namespace custom_ops
