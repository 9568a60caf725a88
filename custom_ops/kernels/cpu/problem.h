// Which cross-entropy, of what, as the kernels of this folder take it.
//
//     z = s·tanh(α·input / s), or α·input without a cap        z' = α (1 − (z/s)²)
//     ỹ_k = w_k ((1 − ε) y_k + ε/C)
//
// For labels, ỹ is never built: one logit is read at the label, and the even share ε/C of all
// classes is one more sum over the row.
#pragma once

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

// The label of one row, with its own share of ỹ; the even share is apart.
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

// The labels of a block's rows, in loops that the compiler turns into vectors.
template <typename acc_t>
struct BlockLabels {
  int64_t t[BLOCK];                     // 0 where it does not count
  acc_t counts[BLOCK], ignored[BLOCK];  // 1 or 0
  bool all_count = true, some_ignored = false;

  void read(const int64_t* labels, int64_t n, int64_t classes, int64_t ignore_index) {
    int64_t counting = 0, ignoring = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = labels[i], is_ignored = label == ignore_index;
      // as a number without a sign, one below 0 is large
      const int64_t is_class = (uint64_t(label) < uint64_t(classes)) & (is_ignored ^ 1);
      t[i] = is_class ? label : 0;
      counts[i] = acc_t(is_class);
      ignored[i] = acc_t(is_ignored);
      counting += is_class;
      ignoring += is_ignored;
    }
    all_count = counting == n;
    some_ignored = ignoring > 0;
  }
};

// The input as logits z, and the slope z' for the gradient.
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

  // z of a run: the input itself, or computed in `buffer`, which may be the input.
  const acc_t* operator()(const acc_t* x, int64_t n, acc_t* buffer) const {
    if (identity_) return x;
    each_vector<acc_t>(n, [&](int64_t i, int64_t count) INLINE {
      const auto v = Vec<acc_t>::loadu(x + i, count);
      (capped_ ? Vec<acc_t>(cap_) * (v * Vec<acc_t>(inner_)).tanh() : v * Vec<acc_t>(scale_))
          .store(buffer + i, count);
    });
    return buffer;
  }

  // d ⊙ z', from z.
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

// ỹ of the run from class c, from its probabilities y.
template <typename acc_t>
auto shares(const Problem<acc_t>& problem, int64_t c, const acc_t* y) {
  const acc_t* w = problem.weight ? problem.weight + c : nullptr;
  return [&problem, y, w](int64_t i, int64_t count) INLINE {
    const auto v = Vec<acc_t>::loadu(y + i, count);
    return problem.weighted(v, w ? Vec<acc_t>::loadu(w + i, count) : v);
  };
}

// Σ_k w_k. Only smoothed labels need it.
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

}  // namespace custom_ops
