// Rows of few classes that lie side by side, as many at a time as a vector has lanes (AVX-512).
//
//   a sum or a maximum   a vector begins at each row; what is joined along the classes of sixteen
//                        rows ends in one vector, lane r for row r (`joined`)
//   a map                the rows follow each other without a gap, so that C vectors hold sixteen
//                        of them; a lane takes the numbers of its row by a permutation (`Lanes`)
//
// Nothing is transposed, no lane of a map is idle, and logarithms and labels are taken sixteen at a
// time. The order in which a row is added up depends on C alone.
#pragma once

#include "problem.h"

namespace custom_ops {

#ifdef CPU_CAPABILITY_AVX512

constexpr int64_t GROUP = 16;
constexpr int64_t FEW = 128;  // classes; from there on a row has vectors enough

template <typename T>
bool is_few(const View& x) {
  return std::is_same_v<T, float> && x.inner == 1 && x.classes <= FEW && x.stride == x.classes;
}

using Float = Vec<float>;

// Lane r: the numbers of v[r], joined in one order for every r.
template <typename Join>
inline INLINE Float joined(const Float (&v)[GROUP], Join join) {
  Float a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    a[i] = join(Float(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44)),
                Float(_mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE)));
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = join(Float(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88)),
                Float(_mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD)));
  }
  for (int i = 0; i < 2; ++i) {
    c[i] = join(Float(_mm512_shuffle_ps(b[i], b[i + 2], 0x44)),
                Float(_mm512_shuffle_ps(b[i], b[i + 2], 0xEE)));
  }
  const Float d = join(Float(_mm512_shuffle_ps(c[0], c[1], 0x88)),
                       Float(_mm512_shuffle_ps(c[0], c[1], 0xDD)));
  // the lanes of d belong to the rows 0 2 1 3, 8 10 9 11, 4 6 5 7, 12 14 13 15
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, d);
}

// Up to sixteen rows: the first of them, and how many.
struct Group {
  int64_t first, n;

  __mmask16 there() const { return __mmask16((1u << n) - 1); }
  Float load(const float* row_numbers) const {
    return _mm512_maskz_loadu_ps(there(), row_numbers + first);
  }
  void store(float* row_numbers, Float x) const {
    _mm512_mask_storeu_ps(row_numbers + first, there(), x);
  }
};

inline INLINE Float loaded(__mmask16 mask, const float* from) {
  return _mm512_maskz_loadu_ps(mask, from);
}

// v[r] = term(r, k, mask) for every vector k of row r, joined; `empty` where there is no such row.
// Without a loop over the vectors all of v can be in registers, so that one or two are apart.
template <int vectors, typename Term, typename Join>
inline INLINE void read_rows(Float (&v)[GROUP], const Group& group, int64_t classes, Float empty,
                             Term term, Join join) {
  const int64_t last = (classes - 1) / GROUP * GROUP;
  const __mmask16 all = 0xFFFF, tail = __mmask16((1u << (classes - last)) - 1);
  for (int64_t r = 0; r < GROUP; ++r) {
    const __mmask16 there = r < group.n ? all : 0, mask = there & tail;
    Float x = empty;
    if constexpr (vectors == 2) x = _mm512_mask_mov_ps(empty, there, term(r, 0, there));
    if constexpr (vectors == 0) {
      for (int64_t k = 0; there && k < last; k += GROUP) x = join(x, term(r, k, all));
    }
    v[r] = _mm512_mask_mov_ps(x, mask, join(x, term(r, last, mask)));
  }
}

template <typename Term, typename Join>
inline INLINE Float over_rows(const Group& group, int64_t classes, float empty, Term term,
                              Join join) {
  Float v[GROUP];
  if (classes <= GROUP) {
    read_rows<1>(v, group, classes, Float(empty), term, join);
  } else if (classes <= 2 * GROUP) {
    read_rows<2>(v, group, classes, Float(empty), term, join);
  } else {
    read_rows<0>(v, group, classes, Float(empty), term, join);
  }
  return joined(v, join);
}

template <typename Term>
inline INLINE Float sums(const Group& group, int64_t classes, Term term) {
  return over_rows(group, classes, 0, term, [](Float a, Float b) INLINE { return a + b; });
}

// M of each row of the logits from z.
inline INLINE Float maxima(const Group& group, int64_t classes, const float* z) {
  return over_rows(
      group, classes, -INF<float>,
      [=](int64_t r, int64_t k, __mmask16 mask) INLINE {
        return loaded(mask, z + r * classes + k);
      },
      [](Float a, Float b) INLINE { return larger(a, b); });
}

// To which row of a group, and to which class, the lanes of its vectors belong.
class Lanes {
 public:
  explicit Lanes(int64_t classes) : classes_(classes) {
    alignas(64) int32_t rows[GROUP], ks[GROUP];
    for (int32_t i = 0; i < GROUP; ++i) {
      rows[i] = i / int32_t(classes);
      ks[i] = i % int32_t(classes);
    }
    row_[0] = _mm512_load_si512(rows);
    k_[0] = _mm512_load_si512(ks);
    const auto rows_on = _mm512_set1_epi32(int(GROUP / classes)), C = _mm512_set1_epi32(classes);
    for (int64_t v = 1; v < classes; ++v) {
      const auto k = _mm512_add_epi32(k_[v - 1], _mm512_set1_epi32(int(GROUP % classes)));
      const auto over = _mm512_cmpge_epi32_mask(k, C);
      const auto row = _mm512_add_epi32(row_[v - 1], rows_on);
      row_[v] = _mm512_mask_add_epi32(row, over, row, _mm512_set1_epi32(1));
      k_[v] = _mm512_mask_sub_epi32(k, over, k, C);
    }
  }

  int64_t classes() const { return classes_; }
  // A row's number, in each of its lanes of vector v.
  Float of_row(int64_t v, Float x) const { return _mm512_permutexvar_ps(row_[v], x); }
  // Whether a lane of vector v is the class of its row.
  __mmask16 is(int64_t v, __m512i classes) const {
    return _mm512_cmpeq_epi32_mask(k_[v], _mm512_permutexvar_epi32(row_[v], classes));
  }

  // f(v, i, count) for every vector v of a group, whose numbers begin at i.
  template <typename F>
  INLINE void each(const Group& group, F f) const {
    const int64_t n = group.n * classes_;
    int64_t v = 0;
    for (; (v + 1) * GROUP <= n; ++v) f(v, v * GROUP, GROUP);
    if (v * GROUP < n) f(v, v * GROUP, n - v * GROUP);
  }

 private:
  int64_t classes_;
  __m512i row_[FEW], k_[FEW];
};

// Writes exp(z − M) of the rows without a gap, and returns the sum of each.
inline INLINE Float exponentials(const Group& group, const Lanes& lanes, const float* z, Float M,
                                 float* e) {
  lanes.each(group, [&](int64_t v, int64_t i, int64_t n) INLINE {
    exp<float>(Float::loadu(z + i, n) - lanes.of_row(v, M)).store(e + i);
  });
  const int64_t classes = lanes.classes();
  return sums(group, classes, [=](int64_t r, int64_t k, __mmask16 mask) INLINE {
    return loaded(mask, e + r * classes + k);
  });
}

// f(group, lanes) for every group of rows, and for a few of these at a time then(group). So what
// waits for the last result of a group does not hold up the next.
template <typename F, typename Then>
void each_group(const View& x, F f, Then then) {
  if (!x.numel()) return;
  constexpr int64_t TOGETHER = 8;
  const int64_t rows = x.rows(), groups = (rows + GROUP - 1) / GROUP;
  const int64_t grain = std::max<int64_t>(1, WORK / (x.classes * GROUP));
  const auto group = [=](int64_t i) { return Group{i * GROUP, std::min(GROUP, rows - i * GROUP)}; };
  at::parallel_for(0, groups, grain, [&](int64_t first, int64_t end) {
    const Lanes lanes(x.classes);
    for (; first < end; first += TOGETHER) {
      const int64_t stop = std::min(first + TOGETHER, end);
      for (int64_t i = first; i < stop; ++i) f(group(i), lanes);
      for (int64_t i = first; i < stop; ++i) then(group(i));
    }
  });
}

template <typename F>
void each_group(const View& x, F f) {
  each_group(x, f, [](const Group&) {});
}

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
  const auto statistics = [&](const Group& group, const Lanes& lanes) {
    alignas(64) float e[GROUP * FEW];
    const float* const z = logits + group.first * C;
    const Float M = maxima(group, C, z);
    group.store(max, M);
    group.store(log_sum, exponentials(group, lanes, z, M, e));
  };
  each_group(x, statistics, [&](const Group& group) {
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
  });
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
