// Softmax and log-softmax, and what their derivatives are made of: one number a row, then a map.
#pragma once

#include <vector>

#include "statistics.h"

namespace custom_ops {

// y = map(z, M, Σ exp(z − M))
template <typename acc_t, typename Map>
void normalise(const View& z, const View& y, Map map) {
  const Source<acc_t> source(z.tensor);
  const Sink<acc_t> sink(y.tensor);
  if (!in_blocks(z)) {
    each_row(z, [&](int64_t r) {
      acc_t buffer[CHUNK];
      RowStatistics<acc_t> row;
      for (int64_t c = 0; c < z.classes; c += CHUNK) {
        const int64_t n = std::min(CHUNK, z.classes - c);
        const int64_t offset = r * z.stride + c;
        row.add(source.load(offset, n, buffer), n,
                [&source, next = offset + n](int64_t i) { source.prefetch(next + i); });
      }
      const Vec<acc_t> M(row.max), S(std::isfinite(row.max) ? acc_t(row.sum) : acc_t(NAN));
      const Vec<acc_t> L(row.log_sum());
      for (int64_t c = 0; c < z.classes; c += CHUNK) {
        const int64_t n = std::min(CHUNK, z.classes - c), offset = r * y.stride + c;
        const acc_t* from = source.load(r * z.stride + c, n, buffer);
        acc_t* to = sink.begin(offset, buffer);
        each_vector<acc_t>(n, [=, &z](int64_t i, int64_t count) {
          source.prefetch((r + 1) * z.stride + c + i);  // while this row is in the cache
          map(Vec<acc_t>::loadu(from + i, count), M, S, L).store(to + i, count);
        });
        sink.end(to, offset, n);
      }
    });
    return;
  }
  each_block(z, [&](const Block& b) {
    Slices<acc_t> in(source, z, b);
    SliceSink<acc_t> out(sink, y, b);
    acc_t max[BLOCK], sum[BLOCK], log_sum[BLOCK];
    block_maximum<acc_t>(z.classes, b.n, [&](int64_t k) { return in[k]; }, max);
    block_sum<acc_t>(z.classes, b.n, sum, [&](int64_t k) {
      return [slice = in[k], &max](int64_t i, int64_t count) {
        return exp(Vec<acc_t>::loadu(slice + i, count) - Vec<acc_t>::loadu(max + i, count));
      };
    });
    block_log(b.n, sum, log_sum);
    for (int64_t k = 0; k < z.classes; ++k) {
      const acc_t* from = in[k];
      acc_t* to = out.begin(k);
      each_vector<acc_t>(b.n, [&](int64_t i, int64_t count) {
        map(Vec<acc_t>::loadu(from + i, count), Vec<acc_t>::loadu(max + i, count),
            Vec<acc_t>::loadu(sum + i, count), Vec<acc_t>::loadu(log_sum + i, count))
            .store(to + i, count);
      });
      out.end(k);
    }
  });
}

// out = map(x, v, Σ_k term(x_k, v_k))
template <typename acc_t, typename Term, typename Map>
void reduce_and_map(const View& x, const View& v, const View& out, Term term, Map map) {
  const Source<acc_t> xs(x.tensor), vs(v.tensor);
  const Sink<acc_t> sink(out.tensor);
  if (!in_blocks(x)) {
    each_row(x, [&](int64_t r) {
      acc_t x_buffer[CHUNK], v_buffer[CHUNK];
      double total = 0;
      for (int64_t c = 0; c < x.classes; c += CHUNK) {
        const int64_t n = std::min(CHUNK, x.classes - c);
        const acc_t* xc = xs.load(r * x.stride + c, n, x_buffer);
        const acc_t* vc = vs.load(r * v.stride + c, n, v_buffer);
        total += sum<acc_t>(n, [=](int64_t i, int64_t count) {
          return term(Vec<acc_t>::loadu(xc + i, count), Vec<acc_t>::loadu(vc + i, count));
        });
      }
      const Vec<acc_t> s{acc_t(total)};
      for (int64_t c = 0; c < x.classes; c += CHUNK) {
        const int64_t n = std::min(CHUNK, x.classes - c), offset = r * out.stride + c;
        const acc_t* xc = xs.load(r * x.stride + c, n, x_buffer);
        const acc_t* vc = vs.load(r * v.stride + c, n, v_buffer);
        acc_t* to = sink.begin(offset, x_buffer);
        each_vector<acc_t>(n, [=, &x, &v](int64_t i, int64_t count) {
          xs.prefetch((r + 1) * x.stride + c + i);
          vs.prefetch((r + 1) * v.stride + c + i);
          map(Vec<acc_t>::loadu(xc + i, count), Vec<acc_t>::loadu(vc + i, count), s)
              .store(to + i, count);
        });
        sink.end(to, offset, n);
      }
    });
    return;
  }
  each_block(x, [&](const Block& b) {
    Slices<acc_t> x_in(xs, x, b), v_in(vs, v, b);
    SliceSink<acc_t> to(sink, out, b);
    acc_t s[BLOCK];
    block_sum<acc_t>(x.classes, b.n, s, [&](int64_t k) {
      return [xk = x_in[k], vk = v_in[k], term](int64_t i, int64_t count) {
        return term(Vec<acc_t>::loadu(xk + i, count), Vec<acc_t>::loadu(vk + i, count));
      };
    });
    for (int64_t k = 0; k < x.classes; ++k) {
      const acc_t *xk = x_in[k], *vk = v_in[k];
      acc_t* o = to.begin(k);
      each_vector<acc_t>(b.n, [&](int64_t i, int64_t count) {
        map(Vec<acc_t>::loadu(xk + i, count), Vec<acc_t>::loadu(vk + i, count),
            Vec<acc_t>::loadu(s + i, count))
            .store(o + i, count);
      });
      to.end(k);
    }
  });
}

// Classes whose exponentials are kept between the two passes: they fit in the second-level cache.
constexpr int64_t KEPT = 1 << 17;

// p = exp(z − M) / Σ exp(z − M), each exponential computed once: relative to the maximum of its run,
// until that of the row is known.
template <typename acc_t>
void softmax_rows(const View& z, const View& p) {
  const Source<acc_t> source(z.tensor);
  const Sink<acc_t> sink(p.tensor);
  each_row(z, [&](int64_t r) {
    thread_local std::vector<acc_t> kept, run_max;
    kept.resize(std::max<size_t>(kept.size(), z.classes));
    run_max.clear();
    acc_t buffer[CHUNK];
    RowStatistics<acc_t> row;
    for (int64_t c = 0; c < z.classes; c += CHUNK) {
      const int64_t n = std::min(CHUNK, z.classes - c);
      const int64_t offset = r * z.stride + c;
      const auto ahead = [&source, next = offset + n](int64_t i) { source.prefetch(next + i); };
      run_max.push_back(row.add(source.load(offset, n, buffer), n, ahead, &kept[c]));
    }
    const double sum = std::isfinite(row.max) ? row.sum : NAN;
    for (int64_t c = 0; c < z.classes; c += CHUNK) {
      const int64_t n = std::min(CHUNK, z.classes - c), offset = r * p.stride + c;
      const Vec<acc_t> factor(acc_t(std::exp(double(run_max[c / CHUNK]) - double(row.max)) / sum));
      acc_t* to = sink.begin(offset, buffer);
      each_vector<acc_t>(n, [=, &z, from = &kept[c]](int64_t i, int64_t count) {
        source.prefetch((r + 1) * z.stride + c + i);
        (Vec<acc_t>::loadu(from + i, count) * factor).store(to + i, count);
      });
      sink.end(to, offset, n);
    }
  });
}

// p = exp(z − M) / Σ exp(z − M)
template <typename acc_t>
void softmax_kernel(const View& z, const View& p) {
  if (!in_blocks(z) && z.classes <= KEPT) return softmax_rows<acc_t>(z, p);
  normalise<acc_t>(z, p, [](auto z, auto M, auto S, auto) { return exp(z - M) / S; });
}

// log p = (z − M) − L
template <typename acc_t>
void log_softmax_kernel(const View& z, const View& y) {
  normalise<acc_t>(z, y, [](auto z, auto M, auto, auto L) { return (z - M) - L; });
}

// J v = vᵀJ = p ⊙ (v − ⟨p, v⟩)
template <typename acc_t>
void contract_kernel(const View& p, const View& v, const View& out) {
  reduce_and_map<acc_t>(
      p, v, out, [](auto p, auto v) { return p * v; },
      [](auto p, auto v, auto pv) { return p * (v - pv); });
}

// v − p Σ_k v_k, with p = exp(y)
template <typename acc_t>
void log_softmax_vjp_kernel(const View& y, const View& v, const View& out) {
  reduce_and_map<acc_t>(
      y, v, out, [](auto, auto v) { return v; },
      [](auto y, auto v, auto s) { return v - exp(y) * s; });
}

// v − ⟨p, v⟩, with p = exp(y)
template <typename acc_t>
void log_softmax_jvp_kernel(const View& y, const View& v, const View& out) {
  reduce_and_map<acc_t>(
      y, v, out, [](auto y, auto v) { return exp(y) * v; },
      [](auto, auto v, auto pv) { return v - pv; });
}

}  // namespace custom_ops
