// ℓ, M, L and the statistics of every row.
//
//     ℓ = ⟨ỹ, (M − z) + L⟩ + λ·lse²        H = −Σ_k p_k log p_k
#pragma once

#include "few.h"
#include "problem.h"

namespace custom_ops {

// What a row's statistics are written to; the last two are null unless they are wanted.
template <typename acc_t>
struct RowResults {
  acc_t *loss, *max, *log_sum;
  int64_t* prediction = nullptr;
  acc_t* entropy = nullptr;

  void unread(int64_t r, bool ignored) const {
    loss[r] = ignored ? acc_t(0) : acc_t(NAN);
    max[r] = log_sum[r] = 0;
    if (prediction) prediction[r] = -1;
    if (entropy) entropy[r] = 0;
  }
};

template <typename T>
void forward_row(const Problem<acc_of<T>>& problem, double weight_sum,
                 const RowResults<acc_of<T>>& results, int64_t r) {
  using acc_t = acc_of<T>;
  const View& x = problem.x;
  const T* const row = x.tensor.const_data_ptr<T>() + r * x.stride;
  const Cap<acc_t> cap(problem.o);
  acc_t buffer[CHUNK], y_buffer[CHUNK];
  const Label<acc_t> label(problem.soft() ? 0 : problem.target.labels[r], x.classes, problem.weight,
                           problem.o);
  if (!problem.soft() && !label.counts) return results.unread(r, label.ignored);

  RowStatistics<T> found;
  const bool spread = problem.soft() || problem.smooth();
  // `distance` is Σ ỹ (reference − z). The reference is a logit, so a common offset cancels
  // exactly.
  acc_t reference = 0, best = 0;
  double distance = 0, mass = problem.soft() ? 0 : weight_sum;
  int64_t best_run = 0;
  for (int64_t c = 0; c < x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, x.classes - c);
    with_logits(cap, row + c, n, buffer, [&](auto z, auto) {
      const T* next = row + c + n;
      const acc_t m = found.add(n, z, [next](int64_t i) INLINE { prefetch(next + i); });
      if (c == 0) {
        best = m;
        reference = std::isfinite(m) ? m : acc_t(0);
      } else if (m > best) {
        best = m;
        best_run = c;
      }
      const Vec<acc_t> from(reference);
      if (problem.soft()) {
        const auto y =
            shares(problem, c, problem.target.probabilities.load(r * x.classes + c, n, y_buffer));
        distance += sum<acc_t>(n, [=](int64_t i, int64_t count) INLINE {
          return product(y(i, count), from - z(i, count));
        });
        mass += sum<acc_t>(n, y);
      } else if (problem.smooth() && problem.weight) {
        distance += sum<acc_t>(n, [=, w = problem.weight + c](int64_t i, int64_t count) INLINE {
          return product(Vec<acc_t>::loadu(w + i, count), from - z(i, count));
        });
      } else if (problem.smooth()) {
        distance +=
            sum<acc_t>(n, [=](int64_t i, int64_t count) INLINE { return from - z(i, count); });
      }
    });
  }

  const acc_t M = found.max, L = found.log_sum();
  acc_t nll = 0;
  if (!problem.soft()) {
    acc_t z = row[label.t];
    nll = (M - *cap(&z, 1, &z)) + L;
  }
  const double lse_distance = (double(M) - double(reference)) + double(L);
  results.loss[r] = problem.loss(problem.soft() ? nullptr : &label, nll,
                           spread ? acc_t(distance + mass * lse_distance) : acc_t(0), M + L);
  results.max[r] = M;
  results.log_sum[r] = L;
  if (results.entropy) {
    double entropy = 0;
    for (int64_t c = 0; c < x.classes; c += CHUNK) {
      const int64_t n = std::min(CHUNK, x.classes - c);
      with_logits(cap, row + c, n, buffer, [&](auto z, auto) {
        entropy += sum<acc_t>(n, [=](int64_t i, int64_t count) INLINE {
          const auto surprisal = (Vec<acc_t>(M) - z(i, count)) + Vec<acc_t>(L);
          return product(exp<acc_t>(surprisal.neg()), surprisal);
        });
      });
    }
    results.entropy[r] = acc_t(entropy);
  }
  if (!results.prediction) return;
  const auto first = [&](int64_t c, auto is_it) {  // in the run from c, or −1
    const int64_t at = find_logit(cap, row + c, std::min(CHUNK, x.classes - c), buffer, is_it);
    return at < 0 ? at : c + at;
  };
  int64_t at = -1;
  if (std::isnan(found.sum)) {  // NaN is the largest, as in torch
    for (int64_t c = 0; c < x.classes && at < 0; c += CHUNK) {
      at = first(c, [](acc_t v) { return std::isnan(v); });
    }
  }
  results.prediction[r] = at < 0 ? first(best_run, [=](acc_t v) { return v == best; }) : at;
}

// The largest logit of each row of a block and its class, run by run; NaN is the largest, as in
// torch.
template <typename acc_t>
struct BlockPrediction {
  acc_t value[BLOCK];
  int64_t at[BLOCK];

  void add(int64_t first, int64_t count, int64_t rows, const acc_t* z) {
    for (int64_t k = 0; k < count; ++k, z += rows) {
      for (int64_t i = 0; i < rows; ++i) {
        if (first + k == 0 || z[i] > value[i] || (std::isnan(z[i]) && !std::isnan(value[i]))) {
          value[i] = z[i];
          at[i] = first + k;
        }
      }
    }
  }
};

template <typename acc_t>
void forward_block(const Problem<acc_t>& problem, double weight_sum,
                   const RowResults<acc_t>& results, const Block& b) {
  const View& x = problem.x;
  const Source<acc_t> source(x.tensor);
  const Cap<acc_t> cap(problem.o);
  Tile<acc_t> tile(source, x, b);
  // read for probabilities alone, and no std::optional: GCC clears all of it for every block
  Tile<acc_t> probabilities(problem.target.probabilities, x, b, x.classes * x.inner);
  BlockStatistics<acc_t> found(b.n);
  BlockPrediction<acc_t> prediction;
  const bool spread = problem.soft() || problem.smooth();
  acc_t reference[BLOCK];  // a logit of each row; see forward_row
  double distance[BLOCK], mass[BLOCK];
  each_run(x.classes, [&](int64_t first, int64_t count) {
    acc_t* z = tile.read(first, count);
    cap(z, count * b.n, z);
    found.add(count, b.n, z);
    if (results.prediction) prediction.add(first, count, b.n, z);
    if (!spread) return;
    if (first == 0) {
      std::fill_n(distance, b.n, 0.0);
      std::fill_n(mass, b.n, problem.soft() ? 0.0 : weight_sum);
      for (int64_t i = 0; i < b.n; ++i) {
        reference[i] = std::isfinite(found.max[i]) ? found.max[i] : acc_t(0);
      }
    }
    const acc_t* y = problem.soft() ? probabilities.read(first, count) : nullptr;
    const auto share = [&](int64_t k, int64_t i, int64_t n) INLINE {
      const Vec<acc_t> w(problem.weight ? problem.weight[first + k] : acc_t(1));
      return y ? problem.weighted(Vec<acc_t>::loadu(y + k * b.n + i, n), w) : w;
    };
    block_add<acc_t>(count, b.n, distance, [&](int64_t k, int64_t i, int64_t n) INLINE {
      return product(share(k, i, n), Vec<acc_t>::loadu(reference + i, n) -
                                         Vec<acc_t>::loadu(z + k * b.n + i, n));
    });
    if (problem.soft()) block_add<acc_t>(count, b.n, mass, share);
  });

  acc_t S[BLOCK], L[BLOCK];
  found.finish(b.n, S, L);
  const acc_t* M = found.max;
  acc_t nll[BLOCK];
  BlockLabels<acc_t> labels;
  if (problem.soft()) {
    std::fill_n(nll, b.n, acc_t(0));
  } else {
    labels.read(problem.target.labels + b.first, b.n, x.classes, problem.o.ignore_index);
    if (x.classes <= RUN) {
      const acc_t* z = tile.read(0, x.classes);
      for (int64_t i = 0; i < b.n; ++i) nll[i] = z[labels.t[i] * b.n + i];
    } else {
      for (int64_t i = 0; i < b.n; ++i) nll[i] = source[b.at(x, i) + labels.t[i] * x.inner];
      cap(nll, b.n, nll);
    }
    for (int64_t i = 0; i < b.n; ++i) nll[i] = (M[i] - nll[i]) + L[i];
  }
  acc_t* loss = results.loss + b.first;
  if (spread || problem.weight || problem.o.z_loss) {
    for (int64_t i = 0; i < b.n; ++i) {
      acc_t even = 0;
      if (spread) {
        even =
            acc_t(distance[i] + mass[i] * ((double(M[i]) - double(reference[i])) + double(L[i])));
      }
      const Label<acc_t> label(problem.soft() ? 0 : problem.target.labels[b.first + i], x.classes,
                               problem.weight, problem.o);
      loss[i] = problem.loss(problem.soft() ? nullptr : &label, nll[i], even, M[i] + L[i]);
    }
  } else {
    std::copy_n(nll, b.n, loss);
  }
  if (results.entropy) {
    double entropy[BLOCK] = {};
    each_run(x.classes, [&](int64_t first, int64_t count) {
      acc_t* z = tile.read(first, count);
      if (x.classes > RUN) cap(z, count * b.n, z);  // a single run was capped in place above
      block_add<acc_t>(count, b.n, entropy, [&](int64_t k, int64_t i, int64_t n) INLINE {
        const auto surprisal = (Vec<acc_t>::loadu(M + i, n) -
                                Vec<acc_t>::loadu(z + k * b.n + i, n)) +
            Vec<acc_t>::loadu(L + i, n);
        return product(exp<acc_t>(surprisal.neg()), surprisal);
      });
    });
    std::copy_n(entropy, b.n, results.entropy + b.first);
  }
  std::copy_n(M, b.n, results.max + b.first);
  std::copy_n(L, b.n, results.log_sum + b.first);
  if (results.prediction) std::copy_n(prediction.at, b.n, results.prediction + b.first);
  if (labels.all_count) return;
  for (int64_t i = 0; i < b.n; ++i) {
    if (!labels.counts[i]) results.unread(b.first + i, labels.ignored[i]);
  }
}

template <typename T>
void cross_entropy_kernel(const Problem<acc_of<T>>& problem, const RowResults<acc_of<T>>& results) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (is_few(problem, results.prediction || results.entropy)) {
      return cross_entropy_few(problem, results.loss, results.max, results.log_sum);
    }
  }
#endif
  const double weights = weight_sum(problem);
  if (in_blocks(problem.x)) {
    each_block(problem.x, [&](const Block& b) { forward_block(problem, weights, results, b); });
  } else {
    each_row(problem.x, [&](int64_t r) { forward_row<T>(problem, weights, results, r); });
  }
}

}  // namespace custom_ops
