// M = max z and L = log Σ exp(z − M), one a row, in one pass over memory.
#pragma once

#include "blocks.h"
#include "exp.h"

namespace custom_ops {

// M and Σ exp(z − M) of a row that comes in runs. A run that raises M rescales the sum so far. A
// NaN may be missed by M, and always makes the sum NaN.
template <typename T>
struct RowStatistics {
  using acc_t = acc_of<T>;
  acc_t max = -INF<acc_t>;
  double sum = 0;

  // Adds the run z(i, count), i < n, and returns the largest of it; `kept`, if given, receives its
  // exponentials relative to that. ahead(i) is called with vector i, to
  // prefetch the run that follows.
  template <typename Get, typename Ahead>
  acc_t add(int64_t n, Get z, Ahead ahead, acc_t* kept = nullptr) {
    const acc_t m = largest<acc_t>(n, z);
    const Vec<acc_t> shift(std::isfinite(m) ? m : acc_t(0));
    const auto term = [=](int64_t i, int64_t count) INLINE {
      ahead(i);
      return exp<T>(z(i, count) - shift);
    };
    const double s = !kept ? custom_ops::sum<acc_t>(n, term)
                           : custom_ops::sum<acc_t>(n, [=](int64_t i, int64_t count) INLINE {
                               const auto e = term(i, count);
                               e.store(kept + i, count);
                               return e;
                             });
    if (m == -INF<acc_t>) {
      sum += s;  // 0, or NaN
    } else if (m > max || std::isnan(m)) {
      sum = (sum == 0 ? 0 : sum * std::exp(double(max) - double(m))) + s;
      max = m;
    } else {
      sum += s * std::exp(double(m) - double(max));
    }
    return m;
  }

  // Adds the run of n logits that lie at z.
  acc_t add(int64_t n, const T* z, acc_t* kept = nullptr) {
    return add(
        n, [z](int64_t i, int64_t count) INLINE { return load(z + i, count); },
        [next = z + n](int64_t i) INLINE { prefetch(next + i); }, kept);
  }

  // L; NaN where M is no number to shift by.
  acc_t log_sum() const { return std::isfinite(max) ? acc_t(std::log(sum)) : acc_t(NAN); }
};

// out[i] = term(0, i) joined with term(1, i), … for each row i of a block. Four vectors of rows at
// a time hide the latency of the join.
template <typename acc_t, typename Term, typename Join>
inline INLINE void block_reduce(int64_t count, int64_t rows, acc_t empty, acc_t* out, Term term,
                                Join join) {
  constexpr int64_t width = Vec<acc_t>::size();
  int64_t i = 0;
  for (; i + 4 * width <= rows; i += 4 * width) {
    Vec<acc_t> a[4] = {Vec<acc_t>(empty), Vec<acc_t>(empty), Vec<acc_t>(empty), Vec<acc_t>(empty)};
    for (int64_t k = 0; k < count; ++k) {
      for (int j = 0; j < 4; ++j) a[j] = join(a[j], term(k, i + j * width, width));
    }
    for (int j = 0; j < 4; ++j) a[j].store(out + i + j * width);
  }
  for (; i < rows; i += width) {
    const int64_t n = std::min(width, rows - i);
    Vec<acc_t> a(empty);
    for (int64_t k = 0; k < count; ++k) a = join(a, term(k, i, n));
    a.store(out + i, n);
  }
}

// out[i] += Σ_k term(k, i), in double between runs of classes; with `first` written, not added to.
template <typename acc_t, typename Term>
void block_add(int64_t count, int64_t rows, double* out, Term term, bool first = false) {
  acc_t part[BLOCK];
  block_reduce<acc_t>(count, rows, acc_t(0), part, term, Plus());
  if (first) {
    std::copy_n(part, rows, out);
  } else {
    for (int64_t i = 0; i < rows; ++i) out[i] += part[i];
  }
}

// The same as RowStatistics for a block: one number for each of its rows.
template <typename acc_t>
struct BlockStatistics {
  acc_t max[BLOCK];
  double sum[BLOCK];

  explicit BlockStatistics(int64_t rows) { std::fill_n(max, rows, -INF<acc_t>); }

  // Adds a run of `count` classes, class k of row i at z[k · rows + i].
  void add(int64_t count, int64_t rows, const acc_t* z) {
    acc_t m[BLOCK], shift[BLOCK];
    block_reduce<acc_t>(
        count, rows, -INF<acc_t>, m,
        [=](int64_t k, int64_t i, int64_t n) INLINE {
          return Vec<acc_t>::loadu(z + k * rows + i, n);
        },
        [](auto a, auto b) INLINE { return larger(a, b); });
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = max[i] > m[i] ? max[i] : m[i];
      shift[i] = m[i] == -INF<acc_t> ? acc_t(0) : m[i];
    }
    for (int64_t i = 0; !first_ && i < rows; ++i) {
      if (sum[i] != 0 && m[i] != max[i]) sum[i] *= std::exp(double(max[i]) - double(shift[i]));
    }
    std::copy_n(m, rows, max);
    const auto term = [=, &shift](int64_t k, int64_t i, int64_t n) INLINE {
      return exp<acc_t>(Vec<acc_t>::loadu(z + k * rows + i, n) - Vec<acc_t>::loadu(shift + i, n));
    };
    block_add<acc_t>(count, rows, sum, term, first_);
    first_ = false;
  }

  // M, Σ exp(z − M) and L, the last two NaN where M is no number to shift by.
  void finish(int64_t rows, acc_t* total, acc_t* log_sum) const {
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t s = acc_t(sum[i]), no_shift = max[i] - max[i];  // 0, or ∞ − ∞: NaN
      total[i] = s + no_shift;
    }
    each_vector<acc_t>(rows, [=](int64_t i, int64_t count) INLINE {
      Vec<acc_t>::loadu(total + i, count).log().store(log_sum + i, count);
    });
  }

 private:
  bool first_ = true;  // there is no sum yet
};

}  // namespace custom_ops
