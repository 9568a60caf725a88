// Softmax and log-softmax, and what their derivatives are made of: one number a row, then a map.
#pragma once

#include <vector>

#include "few.h"
#include "statistics.h"

namespace custom_ops {

// y = map(z, M, Σ exp(z − M), L)
template <typename T, typename Map>
void normalise_rows(const View& z, const View& y, Map map) {
  using acc_t = acc_of<T>;
  const T* const from = z.tensor.const_data_ptr<T>();
  T* const to = y.tensor.mutable_data_ptr<T>();
  each_row(z, [&](int64_t r) {
    const T* row = from + r * z.stride;
    RowStatistics<T> found;
    for (int64_t c = 0; c < z.classes; c += CHUNK) {
      found.add(std::min(CHUNK, z.classes - c), row + c);
    }
    const Vec<acc_t> M(found.max), S(std::isfinite(found.max) ? acc_t(found.sum) : acc_t(NAN));
    const Vec<acc_t> L(found.log_sum());
    const T* next = row + z.stride;
    fill(to + r * y.stride, z.classes, [=](int64_t i, int64_t count) INLINE {
      prefetch(next + i);  // while this row is in the cache
      return map(load(row + i, count), M, S, L);
    });
  });
}

template <typename acc_t, typename Map>
void normalise_blocks(const View& z, const View& y, Map map) {
  const Source<acc_t> source(z.tensor);
  const Sink<acc_t> sink(y.tensor);
  each_block(z, [&](const Block& b) {
    Tile<acc_t> tile(source, z, b);
    SliceSink<acc_t> out(sink, y, b);
    BlockStatistics<acc_t> found(b.n);
    each_run(z.classes, [&](int64_t first, int64_t count) {
      found.add(count, b.n, tile.read(first, count));
    });
    acc_t sum[BLOCK], log_sum[BLOCK];
    found.finish(b.n, sum, log_sum);
    each_run(z.classes, [&](int64_t first, int64_t count) {
      const acc_t* from = tile.read(first, count);
      for (int64_t k = 0; k < count; ++k) {
        acc_t* to = out.begin(first + k);
        each_vector<acc_t>(b.n, [&, from = from + k * b.n](int64_t i, int64_t n) INLINE {
          map(Vec<acc_t>::loadu(from + i, n), Vec<acc_t>::loadu(found.max + i, n),
              Vec<acc_t>::loadu(sum + i, n), Vec<acc_t>::loadu(log_sum + i, n))
              .store(to + i, n);
        });
        out.end(first + k);
      }
    });
  });
}

// out = map(x, v, Σ_k term(x_k, v_k))
template <typename T, typename Term, typename Map>
void reduce_and_map_rows(const View& x, const View& v, const View& out, Term term, Map map) {
  using acc_t = acc_of<T>;
  const T *const xs = x.tensor.const_data_ptr<T>(), *const vs = v.tensor.const_data_ptr<T>();
  T* const to = out.tensor.mutable_data_ptr<T>();
  each_row(x, [&](int64_t r) {
    const T *x_row = xs + r * x.stride, *v_row = vs + r * v.stride;
    double total = 0;
    for (int64_t c = 0; c < x.classes; c += CHUNK) {
      total += sum<acc_t>(std::min(CHUNK, x.classes - c), [=](int64_t i, int64_t count) INLINE {
        return term(load(x_row + c + i, count), load(v_row + c + i, count));
      });
    }
    const Vec<acc_t> s{acc_t(total)};
    fill(to + r * out.stride, x.classes, [=, &x, &v](int64_t i, int64_t count) INLINE {
      prefetch(x_row + x.stride + i);
      prefetch(v_row + v.stride + i);
      return map(load(x_row + i, count), load(v_row + i, count), s);
    });
  });
}

template <typename acc_t, typename Term, typename Map>
void reduce_and_map_blocks(const View& x, const View& v, const View& out, Term term, Map map) {
  const Source<acc_t> xs(x.tensor), vs(v.tensor);
  const Sink<acc_t> sink(out.tensor);
  each_block(x, [&](const Block& b) {
    Tile<acc_t> x_tile(xs, x, b), v_tile(vs, v, b);
    SliceSink<acc_t> to(sink, out, b);
    double total[BLOCK] = {};
    each_run(x.classes, [&](int64_t first, int64_t count) {
      const acc_t *xr = x_tile.read(first, count), *vr = v_tile.read(first, count);
      block_add<acc_t>(count, b.n, total, [&](int64_t k, int64_t i, int64_t n) INLINE {
        const int64_t at = k * b.n + i;
        return term(Vec<acc_t>::loadu(xr + at, n), Vec<acc_t>::loadu(vr + at, n));
      });
    });
    acc_t s[BLOCK];
    std::copy_n(total, b.n, s);
    each_run(x.classes, [&](int64_t first, int64_t count) {
      const acc_t *xr = x_tile.read(first, count), *vr = v_tile.read(first, count);
      for (int64_t k = 0; k < count; ++k) {
        acc_t* o = to.begin(first + k);
        each_vector<acc_t>(b.n, [&](int64_t i, int64_t n) INLINE {
          const int64_t at = k * b.n + i;
          map(Vec<acc_t>::loadu(xr + at, n), Vec<acc_t>::loadu(vr + at, n),
              Vec<acc_t>::loadu(s + i, n))
              .store(o + i, n);
        });
        to.end(first + k);
      }
    });
  });
}

template <typename T, typename Term, typename Map>
void reduce_and_map(const View& x, const View& v, const View& out, Term term, Map map) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (is_few<T>(x) && is_few<T>(v) && is_few<T>(out)) {
      return reduce_and_map_few(x, v, out, term, map);
    }
  }
#endif
  if (in_blocks(x)) {
    reduce_and_map_blocks<acc_of<T>>(x, v, out, term, map);
  } else {
    reduce_and_map_rows<T>(x, v, out, term, map);
  }
}

// Classes whose exponentials are kept between the two passes: they fit in the second-level cache.
constexpr int64_t KEPT = 1 << 17;

// p = exp(z − M) / Σ exp(z − M), each exponential computed once: relative to the maximum of its
// run, until that of the row is known.
template <typename T>
void softmax_rows(const View& z, const View& p) {
  using acc_t = acc_of<T>;
  const T* const from = z.tensor.const_data_ptr<T>();
  T* const to = p.tensor.mutable_data_ptr<T>();
  each_row(z, [&](int64_t r) {
    thread_local std::vector<acc_t> kept, run_max;
    kept.resize(std::max<size_t>(kept.size(), z.classes));
    run_max.clear();
    const T *row = from + r * z.stride, *next = row + z.stride;
    RowStatistics<T> found;
    for (int64_t c = 0; c < z.classes; c += CHUNK) {
      run_max.push_back(found.add(std::min(CHUNK, z.classes - c), row + c, &kept[c]));
    }
    const double sum = std::isfinite(found.max) ? found.sum : NAN;
    for (int64_t c = 0; c < z.classes; c += CHUNK) {
      const double change = std::exp(double(run_max[c / CHUNK]) - double(found.max));
      const Vec<acc_t> factor(acc_t(change / sum));
      fill(to + r * p.stride + c, std::min(CHUNK, z.classes - c),
           [=, e = &kept[c]](int64_t i, int64_t count) INLINE {
             prefetch(next + c + i);
             return Vec<acc_t>::loadu(e + i, count) * factor;
           });
    }
  });
}

// p = exp(z − M) / Σ exp(z − M)
template <typename T>
void softmax_kernel(const View& z, const View& p) {
  using acc_t = acc_of<T>;
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (is_few<T>(z) && is_few<T>(p)) return softmax_few(z, p, false);
  }
#endif
  if (in_blocks(z)) {
    normalise_blocks<acc_t>(
        z, p, [](auto z, auto M, auto S, auto) INLINE { return exp<acc_t>(z - M) / S; });
  } else if (z.classes <= KEPT) {
    softmax_rows<T>(z, p);
  } else {
    normalise_rows<T>(
        z, p, [](auto z, auto M, auto S, auto) INLINE { return exp<T>(z - M) / S; });
  }
}

// log p = (z − M) − L
template <typename T>
void log_softmax_kernel(const View& z, const View& y) {
  const auto map = [](auto z, auto M, auto, auto L) INLINE { return (z - M) - L; };
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, float>) {
    if (is_few<T>(z) && is_few<T>(y)) return softmax_few(z, y, true);
  }
#endif
  if (in_blocks(z)) {
    normalise_blocks<acc_of<T>>(z, y, map);
  } else {
    normalise_rows<T>(z, y, map);
  }
}

// J v = vᵀJ = p ⊙ (v − ⟨p, v⟩)
template <typename T>
void contract_kernel(const View& p, const View& v, const View& out) {
  reduce_and_map<T>(
      p, v, out, [](auto p, auto v) INLINE { return Times<acc_of<T>>{p, v}; },
      [](auto p, auto v, auto pv) INLINE { return p * (v - pv); });
}

// v − p Σ_k v_k, with p = exp(y)
template <typename T>
void log_softmax_vjp_kernel(const View& y, const View& v, const View& out) {
  reduce_and_map<T>(
      y, v, out, [](auto, auto v) INLINE { return v; },
      [](auto y, auto v, auto s) INLINE { return v - exp<T>(y) * s; });
}

// v − ⟨p, v⟩, with p = exp(y)
template <typename T>
void log_softmax_jvp_kernel(const View& y, const View& v, const View& out) {
  reduce_and_map<T>(
      y, v, out, [](auto y, auto v) INLINE { return Times<acc_of<T>>{exp<T>(y), v}; },
      [](auto, auto v, auto pv) INLINE { return v - pv; });
}

}  // namespace custom_ops
