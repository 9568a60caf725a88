// exp is most of the arithmetic of every kernel. It is written out here so that the compiler
// inlines it; at::vec would call a library.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "vectors.h"

namespace custom_ops {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define CUSTOM_OPS_EXP
#ifdef CPU_CAPABILITY_AVX512
#define VECTOR __m512
#define M(name) _mm512_##name##_ps
#define ROUND(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#else
#define VECTOR __m256
#define M(name) _mm256_##name##_ps
#define ROUND(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#endif

// q · 2ⁿ
inline INLINE VECTOR scaled(VECTOR q, VECTOR n) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(q, n);
#else
  // 2ⁿ in two factors: for the denormal results one alone has no exponent.
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [bias](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23));
  };
  return M(mul)(M(mul)(q, power(half)), power(_mm256_sub_epi32(i, half)));
#endif
}
#endif

// exp(x) of numbers that lie in memory as T: for float to within one unit in the last place. For
// the half types, which round by 2⁻⁹ or 2⁻¹², the relative error is up to 1.7e-7 + 1.3e-8·|x|. The
// second term comes from the rounding of 1/ln 2 to float.
//
// With n = round(x / ln 2), for float (Cody and Waite, 1980: ln 2 is subtracted in two parts, of
// which the first times n is exact, so |r| ≤ ln 2 / 2)
//
//     exp(x) = 2ⁿ exp(r)      exp(r) ≈ 1 + r + r² (c₂ + c₃ r + c₄ r² + c₅ r³ + c₆ r⁴)
//
// and for the half types, with f = x / ln 2 − n, |f| ≤ 1/2,
//
//     exp(x) = 2ⁿ 2^f         2^f ≈ 1 + d₁ f + d₂ f² + d₃ f³ + d₄ f⁴ + d₅ f⁵
//
// the relative minimax fits with the value 1 at 0, off by 3.1e-9 and 9.4e-8 at most. x is clamped
// at −104, where the result is 0, as it may be −∞. NaN stays NaN, because max then returns its
// second argument. All callers pass x ≤ 0, up to rounding; above 88 the result is not specified.
template <typename T>
inline INLINE Vec<acc_of<T>> exp(Vec<acc_of<T>> input) {
#ifdef CUSTOM_OPS_EXP
  if constexpr (!std::is_same_v<T, double>) {
    const VECTOR per_ln2 = M(set1)(0x1.715476p+0f);
    const VECTOR x = M(max)(M(set1)(-104.0f), input);
    const VECTOR n = ROUND(M(mul)(x, per_ln2));
    VECTOR q;
    if constexpr (is_half<T>) {
      const VECTOR f = M(fmsub)(x, per_ln2, n);
      q = M(fmadd)(M(set1)(0x1.5bda4p-10f), f, M(set1)(0x1.3ce8acp-7f));
      q = M(fmadd)(q, f, M(set1)(0x1.c6b6d8p-5f));
      q = M(fmadd)(q, f, M(set1)(0x1.ebf9c2p-3f));
      q = M(fmadd)(q, f, M(set1)(0x1.62e42ap-1f));
      q = M(fmadd)(q, f, M(set1)(1.0f));
    } else {
      VECTOR r = M(fnmadd)(n, M(set1)(0x1.62e4p-1f), x);
      r = M(fnmadd)(n, M(set1)(0x1.7f7d1cp-20f), r);
      q = M(fmadd)(M(set1)(0x1.6a2434p-10f), r, M(set1)(0x1.1239e2p-7f));
      q = M(fmadd)(q, r, M(set1)(0x1.5558f2p-5f));
      q = M(fmadd)(q, r, M(set1)(0x1.555492p-3f));
      q = M(fmadd)(q, r, M(set1)(0x1.fffffcp-2f));
      q = M(fmadd)(q, M(mul)(r, r), r);
      q = M(add)(q, M(set1)(1.0f));
    }
    return scaled(q, n);
  }
#endif
  return input.exp();
}

#ifdef CUSTOM_OPS_EXP
#undef CUSTOM_OPS_EXP
#undef VECTOR
#undef M
#undef ROUND
#endif

}  // namespace custom_ops
