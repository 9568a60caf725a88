// Sixteen rows of few classes at a time, as many as a vector has lanes (AVX-512). The rows lie side
// by side.
//
//   a sum or a maximum   a vector begins at each row; what is joined along the classes of sixteen
//                        rows ends in one vector, lane r for row r (`joined`)
//   a map                the rows follow each other without a gap, so that C vectors hold sixteen
//                        of them; a lane takes the numbers of its row by a permutation (`Lanes`)
//   statistics of up to  vectors across sixteen rows, one a class (`columns`): their exponentials
//   sixteen classes      are not written, and need not lie as the logits do
//
// No lane of a map is idle, and logarithms and labels are taken sixteen at a time. The order in
// which a row is added up depends on C alone.
#pragma once

#include <iterator>
#include <utility>

#include "blocks.h"
#include "exp.h"

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
    if constexpr (vectors == 2) {
      x = _mm512_mask_mov_ps(empty, there, join(empty, term(r, 0, there)));
    }
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
  return over_rows(group, classes, 0, term, Plus());
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

// Lane r of column k is class k of row r, of sixteen rows from z. Four numbers are read at a time,
// at the end of the last row up to three that lie behind it.
template <int C>
inline INLINE void columns(const float* z, Float (&column)[C]) {
  for (int k = 0; k < C; k += 4) {
    __m512 rows[4];  // in rows[j] four numbers each of the rows j, 4 + j, 8 + j and 12 + j
    for (int j = 0; j < 4; ++j) {
      const float* const from = z + j * C + k;
      rows[j] = _mm512_castps128_ps512(_mm_loadu_ps(from));
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(from + 4 * C), 1);
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(from + 8 * C), 2);
      rows[j] = _mm512_insertf32x4(rows[j], _mm_loadu_ps(from + 12 * C), 3);
    }
    // of rows 0 and 1 (and 4 and 5, …) classes 0 and 1, then classes 2 and 3; of rows 2 and 3 so
    __m512d pairs[4];
    for (int j = 0; j < 4; j += 2) {
      pairs[j] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[j], rows[j + 1]));
      pairs[j + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[j], rows[j + 1]));
    }
    for (int j = 0; j < 4 && k + j < C; ++j) {
      const __m512d a = pairs[j / 2], b = pairs[2 + j / 2];
      column[k + j] =
          _mm512_castpd_ps(j % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
    }
  }
}

// Lane by lane, the vectors of x joined, in four chains that do not wait for one another.
template <int n, typename Join>
inline INLINE Float joined_lanes(const Float (&x)[n], Join join) {
  Float parts[4];
  for (int i = 0; i < n; ++i) parts[i % 4] = i < 4 ? x[i] : join(parts[i % 4], x[i]);
  Float all = parts[0];
  for (int i = 1; i < 4 && i < n; ++i) all = join(all, parts[i]);
  return all;
}

// M and S = Σ exp(z − M) of a group of rows of C classes. From z on the tensor has `left` numbers.
template <int C>
inline INLINE void group_statistics(const Group& group, const float* z, int64_t left, Float& M,
                              Float& S) {
  Float column[C];
  float copied[GROUP * C + 3];
  if (left < GROUP * C + 3) {
    std::fill(std::copy_n(z, group.n * C, copied), std::end(copied), 0.0f);
    z = copied;
  }
  columns<C>(z, column);
  M = joined_lanes(column, [](Float a, Float b) INLINE { return larger(a, b); });
  for (int k = 0; k < C; ++k) column[k] = exp<float>(column[k] - M);
  S = joined_lanes(column, Plus());
}

// Calls f with the number of classes as a constant, the one of 1 … 16 that is equal; returns
// whether there is one.
template <typename F>
bool with_constant(int64_t classes, F f) {
  return [&]<int... C>(std::integer_sequence<int, C...>) {
    return ((classes == C + 1 && (f(std::integral_constant<int, C + 1>()), true)) || ...);
  }(std::make_integer_sequence<int, GROUP>());
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

#endif

}  // namespace custom_ops
