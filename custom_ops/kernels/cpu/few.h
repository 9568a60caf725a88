// The ops over rows of few float32 classes, by groups of sixteen rows (AVX-512).
#pragma once

#include "groups.h"
#include "problem.h"

namespace custom_ops {

#ifdef CPU_CAPABILITY_AVX512

// The labels of a group.
struct GroupLabels {
  __mmask16 ignored, counts;  // neither ignored nor outside the classes
  __m512i t;                  // −1 where it does not count

  GroupLabels(const int64_t* labels, const Group& group, int64_t classes, int64_t ignore_index) {
    const __mmask16 there = group.there();
    const auto half = [&](__mmask8 mask, int64_t from) {
      return _mm512_maskz_loadu_epi64(mask, labels + group.first + from);
    };
    const __m512i low = half(__mmask8(there), 0), high = half(__mmask8(there >> 8), 8);
    const auto where = [&](auto is) { return __mmask16(is(low) | is(high) << 8); };
    ignored = there & where([=](__m512i x) {
      return _mm512_cmpeq_epi64_mask(x, _mm512_set1_epi64(ignore_index));
    });
    // as numbers without a sign, those below 0 are large
    counts = there & ~ignored & where([=](__m512i x) {
      return _mm512_cmplt_epu64_mask(x, _mm512_set1_epi64(classes));
    });
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)),
                                            _mm512_cvtepi64_epi32(high), 1);
    t = _mm512_mask_mov_epi32(_mm512_set1_epi32(-1), counts, both);
  }

  // One number a class, at the labels; 1 where none counts.
  Float at_label(const float* x, __m512i place) const {
    return _mm512_mask_i32gather_ps(Float(1), counts, place, x, 4);
  }
};

inline bool is_few(const Problem<float>& problem, bool stats) {
  return is_few<float>(problem.x) && problem.x.tensor.scalar_type() == c10::kFloat && !stats &&
      !problem.soft() && !problem.smooth() && Cap<float>(problem.o).identity();
}

// ℓ, M and L of every row, for labels without smoothing.
inline void cross_entropy_few(const Problem<float>& problem, float* loss, float* max,
                              float* log_sum) {
  const View& x = problem.x;
  const float* const logits = x.tensor.const_data_ptr<float>();
  const int64_t C = x.classes;
  const __m512i starts = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(int(C)));
  const auto finish = [&](const Group& group) {  // log_sum holds S until here
    const Float M = group.load(max), L = group.load(log_sum).log();
    const GroupLabels labels(problem.target.labels, group, C, problem.o.ignore_index);
    const Float z_t =
        labels.at_label(logits + group.first * C, _mm512_add_epi32(starts, labels.t));
    Float l = (M - z_t) + L;
    if (problem.weight) l = product(labels.at_label(problem.weight, labels.t), l);
    if (problem.o.z_loss) l = l + Float(float(problem.o.z_loss)) * (M + L) * (M + L);
    l = _mm512_mask_mov_ps(Float(NAN), labels.counts, l);
    group.store(loss, _mm512_maskz_mov_ps(~labels.ignored, l));
    group.store(max, _mm512_maskz_mov_ps(labels.counts, M));
    group.store(log_sum, _mm512_maskz_mov_ps(labels.counts, L));
  };
  const bool done = with_constant(C, [&](auto classes) {
    each_group(x, [&](const Group& group, const Lanes&) {
      const int64_t first = group.first * classes;
      Float M, S;
      group_statistics<classes>(group, logits + first, x.numel() - first, M, S);
      group.store(max, M);
      group.store(log_sum, S);
    }, finish);
  });
  if (done) return;
  each_group(x, [&](const Group& group, const Lanes& lanes) {
    alignas(64) float e[GROUP * FEW];
    const float* const z = logits + group.first * C;
    const Float M = maxima(group, C, z);
    group.store(max, M);
    group.store(log_sum, exponentials(group, lanes, z, M, e));
  }, finish);
}

// a·p − g·ỹ of every row, for labels without smoothing; `to` may be the logits.
template <typename Up>
void cross_entropy_vjp_few(const Problem<float>& problem, const Up& up, float* to) {
  const View& x = problem.x;
  const float* const logits = x.tensor.const_data_ptr<float>();
  const int64_t C = x.classes;
  each_group(x, [&](const Group& group, const Lanes& lanes) {
    const float* const z = logits + group.first * C;
    float* const d = to + group.first * C;
    const GroupLabels labels(problem.target.labels, group, C, problem.o.ignore_index);
    const Float g = up.g.step ? group.load(up.g.data) : Float(up.g[0]);
    const Float M = group.load(up.max), L = group.load(up.log_sum);
    const Float w = problem.weight ? labels.at_label(problem.weight, labels.t) : Float(1);
    Float m = w;
    if (problem.o.z_loss) m = m + Float(float(2 * problem.o.z_loss)) * (M + L);
    Float a = g * m;
    if (up.q.data) a = a + group.load(up.q.data);
    a = _mm512_mask_mov_ps(Float(NAN), labels.counts, a);
    const Float named = w * g;
    const auto write = [&](auto some_ignored) INLINE {
      lanes.each(group, [&](int64_t v, int64_t i, int64_t n) INLINE {
        const Float p = exp<float>((Float::loadu(z + i, n) - lanes.of_row(v, M)) -
                                   lanes.of_row(v, L));
        Float dz = lanes.of_row(v, a) * p;
        dz = _mm512_mask_sub_ps(dz, lanes.is(v, labels.t), dz, lanes.of_row(v, named));
        if constexpr (some_ignored) {
          const Float keeps = lanes.of_row(v, _mm512_maskz_mov_ps(~labels.ignored, Float(1)));
          dz = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(keeps, Float(0), _CMP_NEQ_OQ), dz);
        }
        dz.store(d + i, n);
      });
    };
    if (labels.ignored) {
      write(std::true_type());
    } else {
      write(std::false_type());
    }
  });
}

// p, or log p, of every row.
inline void softmax_few(const View& z, const View& y, bool log) {
  const float* const from = z.tensor.const_data_ptr<float>();
  float* const to = y.tensor.mutable_data_ptr<float>();
  const int64_t C = z.classes;
  each_group(z, [&](const Group& group, const Lanes& lanes) {
    alignas(64) float e[GROUP * FEW];
    const float* const rows = from + group.first * C;
    float* const out = to + group.first * C;
    const Float M = maxima(group, C, rows), S = exponentials(group, lanes, rows, M, e);
    if (log) {
      const Float L = S.log();
      lanes.each(group, [&](int64_t v, int64_t i, int64_t n) INLINE {
        const Float centred = Float::loadu(rows + i, n) - lanes.of_row(v, M);
        (centred - lanes.of_row(v, L)).store(out + i, n);
      });
    } else {
      const Float per_sum = Float(1) / S;
      lanes.each(group, [&](int64_t v, int64_t i, int64_t n) INLINE {
        (Float::loadu(e + i) * lanes.of_row(v, per_sum)).store(out + i, n);
      });
    }
  });
}

// out = map(x, v, Σ_k term(x_k, v_k))
template <typename Term, typename Map>
void reduce_and_map_few(const View& x, const View& v, const View& out, Term term, Map map) {
  const float *const xs = x.tensor.const_data_ptr<float>(),
                    *const vs = v.tensor.const_data_ptr<float>();
  float* const to = out.tensor.mutable_data_ptr<float>();
  const int64_t C = x.classes;
  each_group(x, [&](const Group& group, const Lanes& lanes) {
    const int64_t first = group.first * C;
    const Float s = sums(group, C, [=](int64_t r, int64_t k, __mmask16 mask) INLINE {
      const int64_t at = first + r * C + k;
      return term(loaded(mask, xs + at), loaded(mask, vs + at));
    });
    lanes.each(group, [&](int64_t w, int64_t i, int64_t n) INLINE {
      map(Float::loadu(xs + first + i, n), Float::loadu(vs + first + i, n), lanes.of_row(w, s))
          .store(to + first + i, n);
    });
  });
}

#endif

}  // namespace custom_ops
