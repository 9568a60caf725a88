// Cross-entropy: ℓ, M, L and the prediction of every row, and the gradient from M and L.
//
//     ℓ  = ⟨ỹ, (M − z) + L⟩ + λ·lse²           z = s·tanh(αx/s), or αx without a cap
//     dx = z'(x) ⊙ (a·p − g·ỹ)                 a = g·(m + 2λ·lse) + q,  m = Σ_k ỹ_k
//
// with ỹ_k = w_k ((1 − ε) y_k + ε/C). For labels, only the class that a label names is read for
// itself; the even share ε/C of all classes is one more sum, where there is one.
#pragma once

#include <optional>

#include "statistics.h"

namespace custom_ops {

// Which cross-entropy: `Options` of kernels/problem.py.
struct Options {
  int64_t dim;
  c10::ScalarType dtype;  // in which everything is computed: float or double
  int64_t ignore_index;
  double label_smoothing, z_loss, logit_scale;
  double softcap;  // 0 for none
  bool stats = false;
  bool inplace = false;
};

// One of the two is given.
template <typename acc_t>
struct Target {
  const int64_t* labels = nullptr;
  Source<acc_t> probabilities;
};

// ⟨ỹ, ·⟩ of one row at a class: what the label names, without the even share.
template <typename acc_t>
struct Label {
  bool counts = false;  // neither ignored nor outside the classes
  bool ignored = false;
  int64_t t = 0;
  acc_t weight = 1;  // w_t

  Label() = default;
  Label(int64_t label, int64_t classes, const acc_t* w, const Options& o)
      : ignored(label == o.ignore_index) {
    counts = !ignored && label >= 0 && label < classes;
    if (counts) t = label;
    if (counts && w) weight = w[t];
  }
};

// x as logits z, with the slope z'(x) where the gradient asks for it.
template <typename acc_t>
class Cap {
 public:
  explicit Cap(const Options& o)
      : capped_(o.softcap != 0),
        identity_(!capped_ && o.logit_scale == 1),
        scale_(o.logit_scale),
        inner_(capped_ ? o.logit_scale / o.softcap : 0),
        cap_(o.softcap) {}

  bool identity() const { return identity_; }

  // z of a run: x itself, or computed in `buffer` (which may hold x).
  const acc_t* operator()(const acc_t* x, int64_t n, acc_t* buffer) const {
    if (identity_) return x;
    each_vector<acc_t>(n, [&](int64_t i, int64_t count) INLINE {
      const auto v = Vec<acc_t>::loadu(x + i, count);
      (capped_ ? Vec<acc_t>(cap_) * (v * Vec<acc_t>(inner_)).tanh() : v * Vec<acc_t>(scale_))
          .store(buffer + i, count);
    });
    return buffer;
  }

  // d ⊙ z'(x), from z: z' = α (1 − (z/s)²)
  Vec<acc_t> chain(Vec<acc_t> d, Vec<acc_t> z) const {
    if (!capped_) return d * Vec<acc_t>(scale_);
    const auto t = z / Vec<acc_t>(cap_);
    return d * (Vec<acc_t>(scale_) * (Vec<acc_t>(1) - t * t));
  }

 private:
  bool capped_, identity_;
  acc_t scale_, inner_, cap_;
};

template <typename acc_t>
struct Problem {
  View x;
  Target<acc_t> target;
  const acc_t* weight;  // one a class, or null
  Options o;

  acc_t share() const { return acc_t(o.label_smoothing / double(x.classes)); }  // ε/C
  acc_t rest() const { return acc_t(1 - o.label_smoothing); }                   // 1 − ε
  // Where the probabilities lie.
  View dense() const {
    View like = x;
    like.stride = x.classes * x.inner;
    return like;
  }

  bool soft() const { return bool(target.probabilities); }
  bool smooth() const { return o.label_smoothing != 0; }

  // ỹ of one class, from the probability y.
  Vec<acc_t> weighted(Vec<acc_t> y, Vec<acc_t> w) const {
    if (smooth()) y = y * Vec<acc_t>(rest()) + Vec<acc_t>(share());
    return weight ? w * y : y;
  }

  // ℓ of a row from nll = lse − z_t (labels) or 0, and `spread`: Σ_k w_k (lse − z_k), or ⟨ỹ, ·⟩.
  acc_t loss(const Label<acc_t>* label, acc_t nll, acc_t spread, acc_t lse) const {
    acc_t l = spread;
    if (label) {
      l = weight ? product(label->weight, nll) : nll;
      if (smooth()) {
        l = o.label_smoothing < 1 ? rest() * l + share() * spread : spread / acc_t(x.classes);
      }
    }
    return o.z_loss ? l + acc_t(o.z_loss) * lse * lse : l;
  }
};

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

// ỹ of the run from class c, from its probabilities y.
template <typename acc_t>
auto shares(const Problem<acc_t>& problem, int64_t c, const acc_t* y) {
  const acc_t* w = problem.weight ? problem.weight + c : nullptr;
  return [&problem, y, w](int64_t i, int64_t count) INLINE {
    const auto v = Vec<acc_t>::loadu(y + i, count);
    return problem.weighted(v, w ? Vec<acc_t>::loadu(w + i, count) : v);
  };
}

// Σ_k w_k, needed only where the classes share a part of every row's label.
template <typename acc_t>
double weight_sum(const Problem<acc_t>& problem) {
  if (problem.soft() || !problem.smooth()) return 0;
  if (!problem.weight) return double(problem.x.classes);
  double total = 0;
  for (int64_t c = 0; c < problem.x.classes; c += CHUNK) {
    total += sum<acc_t>(std::min(CHUNK, problem.x.classes - c),
                        [&](int64_t i, int64_t count)
                            INLINE { return Vec<acc_t>::loadu(problem.weight + c + i, count); });
  }
  return total;
}

// Calls f(z, capped) for n logits of the numbers at x, where z(i, count) reads them: as they lie
// there, or from `buffer` where they are capped or scaled.
template <typename T, typename F>
inline void with_logits(const Cap<acc_of<T>>& cap, const T* x, int64_t n, acc_of<T>* buffer, F f) {
  if (cap.identity()) {
    f([x](int64_t i, int64_t count) INLINE { return load(x + i, count); },
      std::false_type());
    return;
  }
  each_vector<acc_of<T>>(n, [=](int64_t i, int64_t count) {
    load(x + i, count).store(buffer + i, count);
  });
  cap(buffer, n, buffer);
  f([buffer](int64_t i, int64_t count) INLINE { return load(buffer + i, count); },
    std::true_type());
}

// The first of n logits for which is_it(z), or −1.
template <typename T, typename Is>
int64_t find_logit(const Cap<acc_of<T>>& cap, const T* x, int64_t n, acc_of<T>* buffer, Is is_it) {
  int64_t found = -1;
  with_logits(cap, x, n, buffer, [&](auto z, auto) {
    each_vector<acc_of<T>>(n, [&](int64_t i, int64_t count) INLINE {
      acc_of<T> few[Vec<acc_of<T>>::size()];
      if (found >= 0) return;
      z(i, count).store(few, count);
      const auto at = std::find_if(few, few + count, is_it) - few;
      if (at < count) found = i + at;
    });
  });
  return found;
}

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
  acc_t reference = 0, best = 0;  // of Σ ỹ (reference − z), a logit: no digits are lost
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
  const View dense = problem.dense();
  std::optional<Tile<acc_t>> probabilities;
  if (problem.soft()) probabilities.emplace(problem.target.probabilities, dense, b);
  BlockStatistics<acc_t> found(b.n);
  BlockPrediction<acc_t> prediction;
  const bool spread = problem.soft() || problem.smooth();
  acc_t reference[BLOCK];  // of Σ ỹ (reference − z), a logit: no digits are lost
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
    const acc_t* y = problem.soft() ? probabilities->read(first, count) : nullptr;
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
  const auto label_of = [&](int64_t i) {
    return Label<acc_t>(problem.target.labels[b.first + i], x.classes, problem.weight, problem.o);
  };
  acc_t nll[BLOCK];
  std::fill_n(nll, b.n, acc_t(0));
  if (!problem.soft()) {
    const acc_t* only_run = x.classes <= RUN ? tile.read(0, x.classes) : nullptr;
    for (int64_t i = 0; i < b.n; ++i) {
      const int64_t t = label_of(i).t;
      acc_t z = only_run ? only_run[t * b.n + i] : source[b.at(x, i) + t * x.inner];
      nll[i] = only_run ? z : *cap(&z, 1, &z);
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
      const Label<acc_t> label = problem.soft() ? Label<acc_t>() : label_of(i);
      loss[i] = problem.loss(problem.soft() ? nullptr : &label, nll[i], even, M[i] + L[i]);
    }
  } else {
    std::copy_n(nll, b.n, loss);
  }
  if (results.entropy) {
    double entropy[BLOCK] = {};
    each_run(x.classes, [&](int64_t first, int64_t count) {
      acc_t* z = tile.read(first, count);
      if (x.classes > RUN) cap(z, count * b.n, z);  // an only run is there, and capped
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
  if (problem.soft()) return;
  for (int64_t i = 0; i < b.n; ++i) {
    if (const auto label = label_of(i); !label.counts) results.unread(b.first + i, label.ignored);
  }
}

template <typename T>
void cross_entropy_kernel(const Problem<acc_of<T>>& problem, const RowResults<acc_of<T>>& results) {
  const double weights = weight_sum(problem);
  if (in_blocks(problem.x)) {
    each_block(problem.x, [&](const Block& b) { forward_block(problem, weights, results, b); });
  } else {
    each_row(problem.x, [&](int64_t r) { forward_row<T>(problem, weights, results, r); });
  }
}

// One number a row, or one for all.
template <typename acc_t>
struct PerRow {
  const acc_t* data;
  int64_t step;

  acc_t operator[](int64_t r) const { return data ? data[r * step] : acc_t(0); }
};

template <typename acc_t>
struct Upstream {
  PerRow<acc_t> g, q;  // of ℓ, and of lse (may be null)
  const acc_t *max, *log_sum;

  // a = g·(m + 2λ·lse) + q
  acc_t factor(int64_t r, acc_t mass, const Options& o) const {
    const acc_t lse = max[r] + log_sum[r];
    return g[r] * (o.z_loss ? mass + acc_t(2 * o.z_loss) * lse : mass) + q[r];
  }
};

// m = Σ_k ỹ_k; for labels, from the mean of the class weights.
template <typename acc_t>
acc_t row_mass(const Problem<acc_t>& problem, const Label<acc_t>& label, acc_t mean_weight,
               int64_t r) {
  if (!problem.soft()) {
    const bool all = problem.weight && problem.smooth();
    return all ? problem.rest() * label.weight + acc_t(problem.o.label_smoothing) * mean_weight
               : label.weight;
  }
  acc_t buffer[CHUNK];
  double total = 0;
  for (int64_t c = 0; c < problem.x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, problem.x.classes - c);
    const acc_t* y = problem.target.probabilities.load(r * problem.x.classes + c, n, buffer);
    total += sum<acc_t>(n, shares(problem, c, y));
  }
  return acc_t(total);
}

template <typename T>
void backward_row(const Problem<acc_of<T>>& problem, const Upstream<acc_of<T>>& up,
                  acc_of<T> mean_weight, const View& out, int64_t r) {
  using acc_t = acc_of<T>;
  const View& x = problem.x;
  const T* const row = x.tensor.const_data_ptr<T>() + r * x.stride;
  T* const to = out.tensor.mutable_data_ptr<T>() + r * out.stride;
  const Cap<acc_t> cap(problem.o);
  acc_t buffer[CHUNK], y_buffer[CHUNK];
  const Label<acc_t> label(problem.soft() ? 0 : problem.target.labels[r], x.classes, problem.weight,
                           problem.o);
  if (!problem.soft() && label.ignored) {
    std::fill_n(to, x.classes, T(0));
    return;
  }

  const acc_t g = up.g[r];
  const acc_t mass = row_mass(problem, label, mean_weight, r);
  const acc_t a = problem.soft() || label.counts ? up.factor(r, mass, problem.o) : acc_t(NAN);
  const Vec<acc_t> A(a), G(g), M(up.max[r]), L(up.log_sum[r]), even(problem.share() * g);
  for (int64_t c = 0; c < x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, x.classes - c);
    with_logits(cap, row + c, n, buffer, [&](auto z, auto capped) {
      const auto p = [=, next = row + c + n](int64_t i, int64_t count) INLINE {
        prefetch(next + i);
        return exp<T>((z(i, count) - M) - L);
      };
      // d(i, count): a·p − g·ỹ but for what the label names
      const auto write = [&](auto d) {
        const auto dx = [=](int64_t i, int64_t count, Vec<acc_t> dz) INLINE {
          if constexpr (capped) return cap.chain(dz, z(i, count));
          return dz;
        };
        const int64_t t = label.t - c;
        const bool named = !problem.soft() && t >= 0 && t < n;
        T at_label;  // taken first: the gradient may take the place of the logits
        if (named) {
          const Vec<acc_t> y(problem.rest() * label.weight * g);
          fill(&at_label, 1, [=](int64_t, int64_t) { return dx(t, 1, d(t, 1) - y); });
        }
        fill(to + c, n, [=](int64_t i, int64_t count) INLINE {
          return dx(i, count, d(i, count));
        });
        if (named) to[c + t] = at_label;
      };
      if (problem.soft()) {
        const auto y =
            shares(problem, c, problem.target.probabilities.load(r * x.classes + c, n, y_buffer));
        write([=](int64_t i, int64_t count) INLINE {
          return A * p(i, count) - G * y(i, count);
        });
      } else if (problem.smooth() && problem.weight) {
        write([=, w = problem.weight + c](int64_t i, int64_t count) INLINE {
          return A * p(i, count) - even * Vec<acc_t>::loadu(w + i, count);
        });
      } else if (problem.smooth()) {
        write([=](int64_t i, int64_t count) INLINE { return A * p(i, count) - even; });
      } else {
        write([=](int64_t i, int64_t count) INLINE { return A * p(i, count); });
      }
    });
  }
}

template <typename acc_t>
void backward_block(const Problem<acc_t>& problem, const Upstream<acc_t>& up, acc_t mean_weight,
                    const Sink<acc_t>& sink, const View& out, const Block& b) {
  const View& x = problem.x;
  const Source<acc_t> source(x.tensor);
  const Cap<acc_t> cap(problem.o);
  Tile<acc_t> tile(source, x, b);
  SliceSink<acc_t> to(sink, out, b);
  const View dense = problem.dense();
  std::optional<Tile<acc_t>> probabilities;
  double mass[BLOCK] = {};
  if (problem.soft()) {
    probabilities.emplace(problem.target.probabilities, dense, b);
    each_run(x.classes, [&](int64_t first, int64_t count) {
      const acc_t* y = probabilities->read(first, count);
      block_add<acc_t>(count, b.n, mass, [&](int64_t k, int64_t i, int64_t n) INLINE {
        const Vec<acc_t> w(problem.weight ? problem.weight[first + k] : acc_t(1));
        return problem.weighted(Vec<acc_t>::loadu(y + k * b.n + i, n), w);
      });
    });
  }
  acc_t a[BLOCK], g[BLOCK], named[BLOCK], M[BLOCK], L[BLOCK];
  acc_t counted[BLOCK];  // 0 where the row is ignored
  int64_t t[BLOCK];
  bool any_ignored = false;
  for (int64_t i = 0; i < b.n; ++i) {
    const int64_t r = b.first + i;
    const Label<acc_t> label(problem.soft() ? 0 : problem.target.labels[r], x.classes,
                             problem.weight, problem.o);
    const bool ignored = !problem.soft() && label.ignored;
    counted[i] = !ignored;
    any_ignored |= ignored;
    M[i] = up.max[r];
    L[i] = up.log_sum[r];
    g[i] = up.g[r];
    t[i] = label.t;
    named[i] = problem.rest() * label.weight * g[i];
    const acc_t m = problem.soft() ? acc_t(mass[i])
        : problem.weight && problem.smooth()
        ? problem.rest() * label.weight + acc_t(problem.o.label_smoothing) * mean_weight
        : label.weight;
    a[i] = problem.soft() || label.counts ? up.factor(r, m, problem.o) : acc_t(NAN);
  }

  each_run(x.classes, [&](int64_t first, int64_t count) {
    acc_t* tile_z = tile.read(first, count);
    cap(tile_z, count * b.n, tile_z);
    const acc_t* y = problem.soft() ? probabilities->read(first, count) : nullptr;
    acc_t in_run[BLOCK];  // the label's class in the run, or −1
    for (int64_t i = 0; i < b.n; ++i) {
      in_run[i] = t[i] >= first && t[i] < first + count ? acc_t(t[i] - first) : acc_t(-1);
    }
    for (int64_t k = 0; k < count; ++k) {
      const acc_t *z = tile_z + k * b.n, *p = y ? y + k * b.n : nullptr;
      const Vec<acc_t> w(problem.weight ? problem.weight[first + k] : acc_t(1)),
          even(problem.share());
      const Vec<acc_t> at_k{acc_t(k)};
      acc_t* d = to.begin(first + k);
      each_vector<acc_t>(b.n, [&](int64_t i, int64_t n) INLINE {
        const auto zi = Vec<acc_t>::loadu(z + i, n);
        auto dz = Vec<acc_t>::loadu(a + i, n) *
            exp<acc_t>((zi - Vec<acc_t>::loadu(M + i, n)) - Vec<acc_t>::loadu(L + i, n));
        if (p) {
          dz = dz - Vec<acc_t>::loadu(g + i, n) * problem.weighted(Vec<acc_t>::loadu(p + i, n), w);
        } else {
          if (problem.smooth()) dz = dz - even * Vec<acc_t>::loadu(g + i, n) * w;
          dz = dz - ((Vec<acc_t>::loadu(in_run + i, n) == at_k) & Vec<acc_t>::loadu(named + i, n));
        }
        if (!cap.identity()) dz = cap.chain(dz, zi);
        if (any_ignored) {
          const auto counts = Vec<acc_t>::loadu(counted + i, n) != Vec<acc_t>(0);
          dz = dz & counts;
        }
        dz.store(d + i, n);
      });
      to.end(first + k);
    }
  });
}

template <typename T>
void cross_entropy_vjp_kernel(const Problem<acc_of<T>>& problem, const Upstream<acc_of<T>>& up,
                              const View& out) {
  using acc_t = acc_of<T>;
  const acc_t mean = acc_t(weight_sum(problem) / double(problem.x.classes));
  if (in_blocks(problem.x)) {
    const Sink<acc_t> sink(out.tensor);
    each_block(problem.x, [&](const Block& b) { backward_block(problem, up, mean, sink, out, b); });
  } else {
    each_row(problem.x, [&](int64_t r) { backward_row<T>(problem, up, mean, out, r); });
  }
}

}  // namespace custom_ops
