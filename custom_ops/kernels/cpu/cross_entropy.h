// Cross-entropy: ℓ, M, L and the prediction of every row, and the gradient from M and L.
//
//     ℓ  = ⟨ỹ, (M − z) + L⟩ + λ·lse²           z = s·tanh(αx/s), or αx without a cap
//     dx = z'(x) ⊙ (a·p − g·ỹ)                 a = g·(m + 2λ·lse) + h,  m = Σ_k ỹ_k
//
// with ỹ_k = w_k ((1 − ε) y_k + ε/C). For labels, only the class that a label names is read for
// itself; the even share ε/C of all classes is one more sum, where there is one.
#pragma once

#include "statistics.h"

namespace custom_ops {

struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, logit_scale;
  double softcap;  // 0 for none
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
    each_vector<acc_t>(n, [&](int64_t i, int64_t count) {
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

// What a row's statistics are written to; `prediction` may be null.
template <typename acc_t>
struct RowResults {
  acc_t *loss, *max, *log_sum;
  int64_t* prediction;

  void unread(int64_t r, bool ignored) const {
    loss[r] = ignored ? acc_t(0) : acc_t(NAN);
    max[r] = log_sum[r] = 0;
    if (prediction) prediction[r] = -1;
  }
};

template <typename acc_t>
void forward_row(const Problem<acc_t>& q, const RowResults<acc_t>& results, int64_t r) {
  const View& x = q.x;
  const Source<acc_t> source(x.tensor);
  const Cap<acc_t> cap(q.o);
  acc_t buffer[CHUNK], y_buffer[CHUNK];
  const Label<acc_t> label(q.soft() ? 0 : q.target.labels[r], x.classes, q.weight, q.o);
  if (!q.soft() && !label.counts) return results.unread(r, label.ignored);

  RowStatistics<acc_t> row;
  const bool spread = q.soft() || q.smooth();
  acc_t reference = 0, best = 0;  // of Σ ỹ (reference − z), a logit: no digits are lost
  double distance = 0, mass = 0;
  int64_t best_run = 0;
  for (int64_t c = 0; c < x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, x.classes - c);
    const int64_t offset = r * x.stride + c;
    const acc_t* z = cap(source.load(offset, n, buffer), n, buffer);
    const acc_t m = row.add(
        z, n, [&source, next = offset + n](int64_t i) { source.prefetch(next + i); });
    if (c == 0) {
      best = m;
      reference = std::isfinite(m) ? m : acc_t(0);
    } else if (m > best) {
      best = m;
      best_run = c;
    }
    if (!spread) continue;
    const acc_t* w = q.weight ? q.weight + c : nullptr;
    const acc_t* y = q.soft() ? q.target.probabilities.load(r * x.classes + c, n, y_buffer) : w;
    const auto share = [&](int64_t i, int64_t count) {
      if (!y) return Vec<acc_t>(1);
      const auto v = Vec<acc_t>::loadu(y + i, count);
      return q.soft() ? q.weighted(v, w ? Vec<acc_t>::loadu(w + i, count) : v) : v;
    };
    distance += sum<acc_t>(n, [&](int64_t i, int64_t count) {
      return product(share(i, count), Vec<acc_t>(reference) - Vec<acc_t>::loadu(z + i, count));
    });
    mass += y ? sum<acc_t>(n, share) : acc_t(n);
  }

  const acc_t M = row.max, L = row.log_sum();
  acc_t nll = 0;
  if (!q.soft()) {
    acc_t z = source[r * x.stride + label.t];
    nll = (M - *cap(&z, 1, &z)) + L;
  }
  const double lse_distance = (double(M) - double(reference)) + double(L);
  results.loss[r] = q.loss(q.soft() ? nullptr : &label, nll,
                           spread ? acc_t(distance + mass * lse_distance) : acc_t(0), M + L);
  results.max[r] = M;
  results.log_sum[r] = L;
  if (!results.prediction) return;
  const auto first = [&](int64_t c, auto is_it) {  // in the run from c, or −1
    const int64_t n = std::min(CHUNK, x.classes - c);
    const acc_t* z = cap(source.load(r * x.stride + c, n, buffer), n, buffer);
    const acc_t* found = std::find_if(z, z + n, is_it);
    return found == z + n ? -1 : c + (found - z);
  };
  int64_t at = -1;
  if (std::isnan(row.sum)) {  // NaN is the largest, as in torch
    for (int64_t c = 0; c < x.classes && at < 0; c += CHUNK) {
      at = first(c, [](acc_t v) { return std::isnan(v); });
    }
  }
  results.prediction[r] = at < 0 ? first(best_run, [=](acc_t v) { return v == best; }) : at;
}

template <typename acc_t>
void forward_block(const Problem<acc_t>& q, const RowResults<acc_t>& results, const Block& b) {
  const View& x = q.x;
  const Cap<acc_t> cap(q.o);
  Slices<acc_t> in(Source<acc_t>(x.tensor), x, b);
  acc_t capped[BLOCK];
  const auto z = [&](int64_t k) { return cap(in[k], b.n, capped); };

  acc_t M[BLOCK];
  int64_t best[BLOCK];
  if (results.prediction) {
    std::fill_n(best, b.n, 0);
    std::copy_n(z(0), b.n, M);
    for (int64_t k = 1; k < x.classes; ++k) {
      const acc_t* slice = z(k);
      for (int64_t i = 0; i < b.n; ++i) {
        if (slice[i] > M[i] || (std::isnan(slice[i]) && !std::isnan(M[i]))) {
          M[i] = slice[i];
          best[i] = k;
        }
      }
    }
  } else {
    block_maximum<acc_t>(x.classes, b.n, z, M);
  }

  acc_t sum[BLOCK], L[BLOCK], distance[BLOCK], mass[BLOCK];
  block_sum<acc_t>(x.classes, b.n, sum, [&](int64_t k) {
    return [slice = z(k), &M](int64_t i, int64_t count) {
      return exp(Vec<acc_t>::loadu(slice + i, count) - Vec<acc_t>::loadu(M + i, count));
    };
  });
  block_log(b.n, sum, L);
  const bool spread = q.soft() || q.smooth();
  if (spread) {
    std::unique_ptr<Slices<acc_t>> y;
    if (q.soft()) y = std::make_unique<Slices<acc_t>>(q.target.probabilities, q.dense(), b);
    const auto share = [&](int64_t k) {
      const Vec<acc_t> w(q.weight ? q.weight[k] : acc_t(1));
      return [&q, w, p = y ? (*y)[k] : nullptr](int64_t i, int64_t count) {
        return p ? q.weighted(Vec<acc_t>::loadu(p + i, count), w) : w;
      };
    };
    block_sum<acc_t>(x.classes, b.n, distance, [&](int64_t k) {
      return [slice = z(k), part = share(k), &M](int64_t i, int64_t count) {
        return product(part(i, count),
                       Vec<acc_t>::loadu(M + i, count) - Vec<acc_t>::loadu(slice + i, count));
      };
    });
    block_sum<acc_t>(x.classes, b.n, mass, share);
  }

  for (int64_t i = 0; i < b.n; ++i) {
    const int64_t r = b.first + i;
    const Label<acc_t> label(q.soft() ? 0 : q.target.labels[r], x.classes, q.weight, q.o);
    if (!q.soft() && !label.counts) {
      results.unread(r, label.ignored);
      continue;
    }
    acc_t nll = 0;
    if (!q.soft()) {
      acc_t z_t = in.at(label.t, i);
      nll = (M[i] - *cap(&z_t, 1, &z_t)) + L[i];
    }
    results.loss[r] = q.loss(q.soft() ? nullptr : &label, nll,
                             spread ? distance[i] + mass[i] * L[i] : acc_t(0), M[i] + L[i]);
    results.max[r] = M[i];
    results.log_sum[r] = L[i];
    if (results.prediction) results.prediction[r] = best[i];
  }
}

template <typename acc_t>
void cross_entropy_kernel(const Problem<acc_t>& q, const RowResults<acc_t>& results) {
  if (in_blocks(q.x)) {
    each_block(q.x, [&](const Block& b) { forward_block(q, results, b); });
  } else {
    each_row(q.x, [&](int64_t r) { forward_row(q, results, r); });
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
  PerRow<acc_t> g, h;  // of ℓ, and of lse (may be null)
  const acc_t *max, *log_sum;

  // a = g·(m + 2λ·lse) + h
  acc_t factor(int64_t r, acc_t mass, const Options& o) const {
    const acc_t lse = max[r] + log_sum[r];
    return g[r] * (o.z_loss ? mass + acc_t(2 * o.z_loss) * lse : mass) + h[r];
  }
};

// ỹ of the run from class c, from its probabilities y.
template <typename acc_t>
auto shares(const Problem<acc_t>& q, int64_t c, const acc_t* y) {
  const acc_t* w = q.weight ? q.weight + c : nullptr;
  return [&q, y, w](int64_t i, int64_t count) {
    const auto v = Vec<acc_t>::loadu(y + i, count);
    return q.weighted(v, w ? Vec<acc_t>::loadu(w + i, count) : v);
  };
}

// m = Σ_k ỹ_k; for labels, from the mean of the class weights.
template <typename acc_t>
acc_t row_mass(const Problem<acc_t>& q, const Label<acc_t>& label, acc_t mean_weight, int64_t r) {
  if (!q.soft()) {
    const bool all = q.weight && q.smooth();
    return all ? q.rest() * label.weight + acc_t(q.o.label_smoothing) * mean_weight : label.weight;
  }
  acc_t buffer[CHUNK];
  double total = 0;
  for (int64_t c = 0; c < q.x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, q.x.classes - c);
    const acc_t* y = q.target.probabilities.load(r * q.x.classes + c, n, buffer);
    total += sum<acc_t>(n, shares(q, c, y));
  }
  return acc_t(total);
}

// Needed only where all of the weights meet each row.
template <typename acc_t>
acc_t mean_weight(const Problem<acc_t>& q) {
  if (!q.weight || !q.smooth()) return 0;
  return sum<acc_t>(q.x.classes, [&](int64_t i, int64_t count) {
    return Vec<acc_t>::loadu(q.weight + i, count);
  }) / acc_t(q.x.classes);
}

template <typename acc_t>
void backward_row(const Problem<acc_t>& q, const Upstream<acc_t>& up, acc_t mean_weight,
                  const Sink<acc_t>& sink, const View& out, int64_t r) {
  const View& x = q.x;
  const Source<acc_t> source(x.tensor);
  const Cap<acc_t> cap(q.o);
  acc_t z_buffer[CHUNK], d_buffer[CHUNK], y_buffer[CHUNK];
  const Label<acc_t> label(q.soft() ? 0 : q.target.labels[r], x.classes, q.weight, q.o);
  if (!q.soft() && label.ignored) return sink.zero(r * out.stride, x.classes);

  const acc_t g = up.g[r];
  const acc_t mass = row_mass(q, label, mean_weight, r);
  const acc_t a = q.soft() || label.counts ? up.factor(r, mass, q.o) : acc_t(NAN);
  const Vec<acc_t> A(a), G(g), M(up.max[r]), L(up.log_sum[r]), even(q.share() * g);
  for (int64_t c = 0; c < x.classes; c += CHUNK) {
    const int64_t n = std::min(CHUNK, x.classes - c), offset = r * out.stride + c;
    const acc_t* z = cap(source.load(r * x.stride + c, n, z_buffer), n, z_buffer);
    // with a cap, z is needed once more after d
    acc_t* d = sink.begin(offset, d_buffer);
    const auto p = [=, next = r * x.stride + c + n](int64_t i, int64_t count) {
      source.prefetch(next + i);
      return exp((Vec<acc_t>::loadu(z + i, count) - M) - L);
    };
    if (q.soft()) {
      const auto y =
          shares(q, c, q.target.probabilities.load(r * x.classes + c, n, y_buffer));
      each_vector<acc_t>(n, [&](int64_t i, int64_t count) {
        (A * p(i, count) - G * y(i, count)).store(d + i, count);
      });
    } else if (q.smooth()) {
      const acc_t* w = q.weight ? q.weight + c : nullptr;
      each_vector<acc_t>(n, [&](int64_t i, int64_t count) {
        const auto e = w ? even * Vec<acc_t>::loadu(w + i, count) : even;
        (A * p(i, count) - e).store(d + i, count);
      });
    } else {
      each_vector<acc_t>(n, [&](int64_t i, int64_t count) { (A * p(i, count)).store(d + i, count); });
    }
    if (!q.soft() && c <= label.t && label.t < c + n) {
      d[label.t - c] -= q.rest() * label.weight * g;
    }
    if (!cap.identity()) {
      each_vector<acc_t>(n, [&](int64_t i, int64_t count) {
        cap.chain(Vec<acc_t>::loadu(d + i, count), Vec<acc_t>::loadu(z + i, count))
            .store(d + i, count);
      });
    }
    sink.end(d, offset, n);
  }
}

template <typename acc_t>
void backward_block(const Problem<acc_t>& q, const Upstream<acc_t>& up, acc_t mean_weight,
                    const Sink<acc_t>& sink, const View& out, const Block& b) {
  const View& x = q.x;
  const Cap<acc_t> cap(q.o);
  Slices<acc_t> in(Source<acc_t>(x.tensor), x, b);
  SliceSink<acc_t> to(sink, out, b);
  acc_t capped[BLOCK];

  std::unique_ptr<Slices<acc_t>> y;
  acc_t mass[BLOCK];
  if (q.soft()) {
    y = std::make_unique<Slices<acc_t>>(q.target.probabilities, q.dense(), b);
    block_sum<acc_t>(x.classes, b.n, mass, [&](int64_t k) {
      const Vec<acc_t> w(q.weight ? q.weight[k] : acc_t(1));
      return [&q, w, p = (*y)[k]](int64_t i, int64_t count) {
        return q.weighted(Vec<acc_t>::loadu(p + i, count), w);
      };
    });
  }
  acc_t a[BLOCK], g[BLOCK], named[BLOCK], M[BLOCK], L[BLOCK];
  int64_t t[BLOCK];
  bool ignored[BLOCK], any_ignored = false;
  for (int64_t i = 0; i < b.n; ++i) {
    const int64_t r = b.first + i;
    const Label<acc_t> label(q.soft() ? 0 : q.target.labels[r], x.classes, q.weight, q.o);
    ignored[i] = !q.soft() && label.ignored;
    any_ignored |= ignored[i];
    M[i] = up.max[r];
    L[i] = up.log_sum[r];
    g[i] = up.g[r];
    t[i] = label.t;
    named[i] = q.rest() * label.weight * g[i];
    const acc_t m = q.soft() ? mass[i]
        : q.weight && q.smooth()
        ? q.rest() * label.weight + acc_t(q.o.label_smoothing) * mean_weight
        : label.weight;
    a[i] = q.soft() || label.counts ? up.factor(r, m, q.o) : acc_t(NAN);
  }

  for (int64_t k = 0; k < x.classes; ++k) {
    const acc_t* z = cap(in[k], b.n, capped);
    const acc_t* p = q.soft() ? (*y)[k] : nullptr;
    const Vec<acc_t> w(q.weight ? q.weight[k] : acc_t(1));
    acc_t* d = to.begin(k);
    each_vector<acc_t>(b.n, [&](int64_t i, int64_t count) {
      const auto zi = Vec<acc_t>::loadu(z + i, count), G = Vec<acc_t>::loadu(g + i, count);
      auto dz = Vec<acc_t>::loadu(a + i, count) *
          exp((zi - Vec<acc_t>::loadu(M + i, count)) - Vec<acc_t>::loadu(L + i, count));
      if (p) {
        dz = dz - G * q.weighted(Vec<acc_t>::loadu(p + i, count), w);
      } else if (q.smooth()) {
        dz = dz - Vec<acc_t>(q.share()) * G * w;
      }
      dz.store(d + i, count);
    });
    if (!q.soft()) {
      for (int64_t i = 0; i < b.n; ++i) d[i] -= t[i] == k ? named[i] : acc_t(0);
    }
    if (!cap.identity()) {
      each_vector<acc_t>(b.n, [&](int64_t i, int64_t count) {
        cap.chain(Vec<acc_t>::loadu(d + i, count), Vec<acc_t>::loadu(z + i, count))
            .store(d + i, count);
      });
    }
    if (any_ignored) {
      for (int64_t i = 0; i < b.n; ++i) d[i] = ignored[i] ? acc_t(0) : d[i];
    }
    to.end(k);
  }
}

template <typename acc_t>
void cross_entropy_vjp_kernel(const Problem<acc_t>& q, const Upstream<acc_t>& up, const View& out) {
  const Sink<acc_t> sink(out.tensor);
  const acc_t mean = mean_weight(q);
  if (in_blocks(q.x)) {
    each_block(q.x, [&](const Block& b) { backward_block(q, up, mean, sink, out, b); });
  } else {
    each_row(q.x, [&](int64_t r) { backward_row(q, up, mean, sink, out, r); });
  }
}

}  // namespace custom_ops
