// The gradient of every row, from its M and L.
//
//     d_input = z' ⊙ (a·p − g·ỹ)           a = g·(m + 2λ·lse) + q,  m = Σ_k ỹ_k
#pragma once

#include "few.h"
#include "problem.h"

namespace custom_ops {

using at::vec::fmadd, at::vec::fmsub;

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

// m = Σ_k ỹ_k. For labels it follows from the mean of the class weights.
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
      // d(i, count) is a·p − g·ỹ without the label's own share.
      const auto write = [&](auto d) {
        const auto dx = [=](int64_t i, int64_t count, Vec<acc_t> dz) INLINE {
          if constexpr (capped) return cap.chain(dz, z(i, count));
          return dz;
        };
        const int64_t t = label.t - c;
        const bool named = !problem.soft() && t >= 0 && t < n;
        T at_label;  // computed first, because the gradient may overwrite the logits
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

// What the gradient of a block's rows is made of: a, g and the label's own share.
template <typename acc_t>
struct BlockFactors {
  BlockLabels<acc_t> labels;
  acc_t a[BLOCK], g[BLOCK], at_label[BLOCK];

  BlockFactors(const Problem<acc_t>& problem, const Upstream<acc_t>& up, acc_t mean_weight,
               Tile<acc_t>& probabilities, const Block& b) {
    acc_t m[BLOCK];  // Σ_k ỹ_k
    for (int64_t i = 0; i < b.n; ++i) g[i] = up.g[b.first + i];
    if (problem.soft()) {
      add_masses(problem, probabilities, b, m);
    } else {
      labels.read(problem.target.labels + b.first, b.n, problem.x.classes, problem.o.ignore_index);
      for (int64_t i = 0; i < b.n; ++i) {
        m[i] = problem.weight ? problem.weight[labels.t[i]] : acc_t(1);
        at_label[i] = problem.rest() * m[i] * g[i];
      }
    }
    const bool all = !problem.soft() && problem.weight && problem.smooth();
    const acc_t of_all = acc_t(problem.o.label_smoothing) * mean_weight;
    each_vector<acc_t>(b.n, [&](int64_t i, int64_t n) INLINE {
      auto mass = Vec<acc_t>::loadu(m + i, n);
      if (all) mass = fmadd(Vec<acc_t>(problem.rest()), mass, Vec<acc_t>(of_all));
      if (problem.o.z_loss) {
        const auto lse = Vec<acc_t>::loadu(up.max + b.first + i, n) +
            Vec<acc_t>::loadu(up.log_sum + b.first + i, n);
        mass = fmadd(Vec<acc_t>(acc_t(2 * problem.o.z_loss)), lse, mass);
      }
      const auto G = Vec<acc_t>::loadu(g + i, n);
      const auto factor =
          up.q.data ? fmadd(G, mass, Vec<acc_t>::loadu(up.q.data + b.first + i, n)) : G * mass;
      factor.store(a + i, n);
    });
    for (int64_t i = 0; !labels.all_count && i < b.n; ++i) {
      a[i] = labels.counts[i] ? a[i] : acc_t(NAN);
    }
  }

 private:
  static void add_masses(const Problem<acc_t>& problem, Tile<acc_t>& probabilities, const Block& b,
                         acc_t* m) {
    double mass[BLOCK];
    each_run(problem.x.classes, [&](int64_t first, int64_t count) {
      const acc_t* y = probabilities.read(first, count);
      const auto share = [&](int64_t k, int64_t i, int64_t n) INLINE {
        const Vec<acc_t> w(problem.weight ? problem.weight[first + k] : acc_t(1));
        return problem.weighted(Vec<acc_t>::loadu(y + k * b.n + i, n), w);
      };
      block_add<acc_t>(count, b.n, mass, share, first == 0);
    });
    std::copy_n(mass, b.n, m);
  }
};

template <typename acc_t>
void backward_block(const Problem<acc_t>& problem, const Upstream<acc_t>& up, acc_t mean_weight,
                    const Sink<acc_t>& sink, const View& out, const Block& b) {
  const View& x = problem.x;
  const Source<acc_t> source(x.tensor);
  const Cap<acc_t> cap(problem.o);
  Tile<acc_t> tile(source, x, b);
  Tile<acc_t> probabilities(problem.target.probabilities, x, b, x.classes * x.inner);
  SliceSink<acc_t> to(sink, out, b);
  const BlockFactors<acc_t> factors(problem, up, mean_weight, probabilities, b);
  const BlockLabels<acc_t>& labels = factors.labels;
  const acc_t *a = factors.a, *g = factors.g, *at_label = factors.at_label;
  const acc_t *M = up.max + b.first, *L = up.log_sum + b.first;

  // `plain`: labels whose rows all count, neither smoothed nor of capped logits
  const auto write = [&](auto plain) INLINE {
    acc_t in_run[BLOCK], buffer[BLOCK];
    const Vec<acc_t> even(problem.share());
    each_run(x.classes, [&](int64_t first, int64_t count) INLINE {
      const acc_t* y = problem.soft() ? probabilities.read(first, count) : nullptr;
      // equal to k where the label is the run's class k
      for (int64_t i = 0; !problem.soft() && i < b.n; ++i) in_run[i] = acc_t(labels.t[i] - first);
      for (int64_t k = 0; k < count; ++k) {
        const acc_t *z = cap(tile.once(first + k), b.n, buffer), *p = y ? y + k * b.n : nullptr;
        const Vec<acc_t> w(problem.weight ? problem.weight[first + k] : acc_t(1));
        const Vec<acc_t> at_k{acc_t(k)};
        acc_t* d = to.begin(first + k);
        each_vector<acc_t>(b.n, [&](int64_t i, int64_t n) INLINE {
          const auto zi = Vec<acc_t>::loadu(z + i, n), A = Vec<acc_t>::loadu(a + i, n);
          const auto e =
              exp<acc_t>((zi - Vec<acc_t>::loadu(M + i, n)) - Vec<acc_t>::loadu(L + i, n));
          const auto named = [&]() INLINE {
            return (Vec<acc_t>::loadu(in_run + i, n) == at_k) & Vec<acc_t>::loadu(at_label + i, n);
          };
          Vec<acc_t> dz;
          if constexpr (plain) {
            dz = fmsub(A, e, named());
          } else {
            const auto G = Vec<acc_t>::loadu(g + i, n);
            if (p) {
              dz = fmsub(A, e, G * problem.weighted(Vec<acc_t>::loadu(p + i, n), w));
            } else if (problem.smooth()) {
              dz = fmsub(A, e, even * G * w) - named();
            } else {
              dz = fmsub(A, e, named());
            }
            if (!cap.identity()) dz = cap.chain(dz, zi);
            if (labels.some_ignored) {
              dz = dz & (Vec<acc_t>::loadu(labels.ignored + i, n) == Vec<acc_t>(0));
            }
          }
          dz.store(d + i, n);
        });
        to.end(first + k);
      }
    });
  };
  if (!problem.soft() && !labels.some_ignored && !problem.smooth() && cap.identity()) {
    write(std::true_type());
  } else {
    write(std::false_type());
  }
}

template <typename T>
void cross_entropy_vjp_kernel(const Problem<acc_of<T>>& problem, const Upstream<acc_of<T>>& up,
                              const View& out) {
  using acc_t = acc_of<T>;
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (is_few(problem, false) && is_few<T>(out)) {
      return cross_entropy_vjp_few(problem, up, out.tensor.mutable_data_ptr<T>());
    }
  }
#endif
  const acc_t mean = acc_t(weight_sum(problem) / double(problem.x.classes));
  if (in_blocks(problem.x)) {
    const Sink<acc_t> sink(out.tensor);
    each_block(problem.x, [&](const Block& b) { backward_block(problem, up, mean, sink, out, b); });
  } else {
    each_row(problem.x, [&](int64_t r) { backward_row<T>(problem, up, mean, out, r); });
  }
}

}  // namespace custom_ops
