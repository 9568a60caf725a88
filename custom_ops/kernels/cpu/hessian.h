// The second derivative of a row's cross-entropy along a direction u, in place: dz is written over
// the logits, and its change along u over u.
//
//     dz = a·p − g·ỹ                               a = g·c + q,  c = m + 2λ·lse
//     H u = ∂⟨u, dz⟩/∂z = a·J u + 2λ·g·⟨p, u⟩·p    J u = p ⊙ (u − ⟨p, u⟩)
//
// and ∂⟨u, dz⟩/∂g = c·⟨p, u⟩ − ⟨ỹ, u⟩, ∂⟨u, dz⟩/∂q = ⟨p, u⟩. For logits without cap and scale.
#pragma once

#include "backward.h"

namespace custom_ops {

template <typename acc_t>
struct HessianResults {
  acc_t *g, *q;
};

template <typename acc_t>
void hessian_row(const Problem<acc_t>& problem, const Upstream<acc_t>& up, acc_t mean_weight,
                 const at::Tensor& direction, const HessianResults<acc_t>& results, int64_t r) {
  const int64_t classes = problem.x.classes, first = r * classes;
  const Source<acc_t> logits(problem.x.tensor), along(direction);
  const Sink<acc_t> gradient(problem.x.tensor), change(direction);
  acc_t z_buffer[CHUNK], u_buffer[CHUNK], y_buffer[CHUNK], d_buffer[CHUNK], r_buffer[CHUNK];
  const Label<acc_t> label(problem.soft() ? 0 : problem.target.labels[r], classes, problem.weight,
                           problem.o);
  if (!problem.soft() && label.ignored) {
    results.g[r] = results.q[r] = 0;
    gradient.zero(first, classes);
    return change.zero(first, classes);
  }

  const acc_t g = up.g[r], lse = up.max[r] + up.log_sum[r];
  const acc_t c = row_mass(problem, label, mean_weight, r) + acc_t(2 * problem.o.z_loss) * lse;
  const acc_t a = problem.soft() || label.counts ? g * c + up.q[r] : acc_t(NAN);
  const Vec<acc_t> M(up.max[r]), L(up.log_sum[r]);
  const auto each_run = [&](auto f) {  // p, u, and ỹ without the label's own share
    for (int64_t from = 0; from < classes; from += CHUNK) {
      const int64_t n = std::min(CHUNK, classes - from);
      const acc_t* z = logits.load(first + from, n, z_buffer);
      const acc_t* u = along.load(first + from, n, u_buffer);
      const acc_t* w = problem.weight ? problem.weight + from : nullptr;
      const acc_t* y =
          problem.soft() ? problem.target.probabilities.load(first + from, n, y_buffer) : nullptr;
      f(from, n, u, [=, &problem](int64_t i, int64_t count) INLINE {
        return exp<acc_t>((Vec<acc_t>::loadu(z + i, count) - M) - L);
      }, [=, &problem](int64_t i, int64_t count) INLINE {
        const auto wi = w ? Vec<acc_t>::loadu(w + i, count) : Vec<acc_t>(1);
        if (y) return problem.weighted(Vec<acc_t>::loadu(y + i, count), wi);
        return problem.smooth() ? Vec<acc_t>(problem.share()) * wi : Vec<acc_t>(0);
      });
    }
  };
  double p_u = 0, y_u = 0;
  const bool even = problem.soft() || problem.smooth();
  each_run([&](int64_t, int64_t n, const acc_t* u, auto p, auto y) {
    p_u += sum<acc_t>(n, [&](int64_t i, int64_t count) INLINE {
      return Times<acc_t>{p(i, count), Vec<acc_t>::loadu(u + i, count)};
    });
    if (!even) return;
    y_u += sum<acc_t>(n, [&](int64_t i, int64_t count) INLINE {
      return product(y(i, count), Vec<acc_t>::loadu(u + i, count));
    });
  });
  const acc_t pu = acc_t(p_u), named = problem.soft() ? acc_t(0) : problem.rest() * label.weight;
  if (!problem.soft()) y_u += product(named, along[first + label.t]);
  results.g[r] = c * pu - acc_t(y_u);
  results.q[r] = pu;

  const Vec<acc_t> A(a), G(g), PU(pu), Z(acc_t(2 * problem.o.z_loss) * g * pu);
  each_run([&](int64_t from, int64_t n, const acc_t* u, auto p, auto y) {
    acc_t* d = gradient.begin(first + from, d_buffer);
    acc_t* change_of_d = change.begin(first + from, r_buffer);
    each_vector<acc_t>(n, [&](int64_t i, int64_t count) INLINE {
      const auto pi = p(i, count);
      const auto ui = Vec<acc_t>::loadu(u + i, count);
      (even ? A * pi - G * y(i, count) : A * pi).store(d + i, count);
      (pi * (A * (ui - PU) + Z)).store(change_of_d + i, count);
    });
    if (!problem.soft() && from <= label.t && label.t < from + n) d[label.t - from] -= named * g;
    gradient.end(d, first + from, n);
    change.end(change_of_d, first + from, n);
  });
}

template <typename acc_t>
void hessian_kernel(const Problem<acc_t>& problem, const Upstream<acc_t>& up,
                    const at::Tensor& direction, const HessianResults<acc_t>& results) {
  const acc_t mean = acc_t(weight_sum(problem) / double(problem.x.classes));
  each_row(problem.x, [&](int64_t r) { hessian_row(problem, up, mean, direction, results, r); });
}

}  // namespace custom_ops
