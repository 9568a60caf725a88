// M = max z and L = log Σ exp(z − M), one a row, in one pass over memory.
#pragma once

#include "blocks.h"
#include "exp.h"

namespace custom_ops {

// M and Σ exp(z − M) of a row that comes in runs: a run that raises M rescales what came before. A
// NaN may leave no trace in M; it does in the sum.
template <typename acc_t>
struct RowStatistics {
  acc_t max = -INF<acc_t>;
  double sum = 0;

  // Adds a run and returns the largest of it; `kept`, if given, receives its exponentials relative
  // to that. ahead(i) is called beside the arithmetic of vector i, to ask for the run that follows:
  // the first look at a run waits for memory, and this one does not.
  template <typename Ahead>
  acc_t add(const acc_t* z, int64_t n, Ahead ahead, acc_t* kept = nullptr) {
    const acc_t m = largest(z, n);
    const Vec<acc_t> shift(std::isfinite(m) ? m : acc_t(0));
    const auto term = [=](int64_t i, int64_t count) {
      ahead(i);
      return exp(Vec<acc_t>::loadu(z + i, count) - shift);
    };
    const double s = !kept ? custom_ops::sum<acc_t>(n, term)
                           : custom_ops::sum<acc_t>(n, [=](int64_t i, int64_t count) {
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

  // L; NaN where M is no number to shift by.
  acc_t log_sum() const { return std::isfinite(max) ? acc_t(std::log(sum)) : acc_t(NAN); }
};

// The same for a block: `max` and `sum` hold one number for each of its rows.
template <typename acc_t, typename Get>
void block_maximum(int64_t classes, int64_t n, Get z, acc_t* max) {
  std::fill_n(max, n, -INF<acc_t>);
  for (int64_t k = 0; k < classes; ++k) {
    const acc_t* slice = z(k);
    each_vector<acc_t>(n, [=](int64_t i, int64_t count) {
      larger(Vec<acc_t>::loadu(max + i, count), Vec<acc_t>::loadu(slice + i, count))
          .store(max + i, count);
    });
  }
}

// Σ_k term(k, i, count) for each row of a block, in double between runs of classes.
template <typename acc_t, typename Term>
void block_sum(int64_t classes, int64_t n, acc_t* total, Term term) {
  constexpr int64_t run = 256;
  acc_t part[BLOCK];
  double sums[BLOCK] = {};
  for (int64_t begin = 0; begin < classes; begin += run) {
    std::fill_n(part, n, acc_t(0));
    const int64_t end = std::min(classes, begin + run);
    for (int64_t k = begin; k < end; ++k) {
      auto slice = term(k);
      each_vector<acc_t>(n, [&](int64_t i, int64_t count) {
        (Vec<acc_t>::loadu(part + i, count) + slice(i, count)).store(part + i, count);
      });
    }
    for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
  }
  std::copy_n(sums, n, total);
}

template <typename acc_t>
void block_log(int64_t n, const acc_t* x, acc_t* log) {
  each_vector<acc_t>(n, [=](int64_t i, int64_t count) {
    Vec<acc_t>::loadu(x + i, count).log().store(log + i, count);
  });
}

}  // namespace custom_ops
