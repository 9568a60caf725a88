// The kernels as functions of tensors. They trust their arguments, except that every label is
// checked before it is used as an index. The registered operators check the rest first (`check.h`).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <functional>
#include <optional>
#include <sstream>
#include <tuple>
#include <vector>

#include "check.h"
#include "backward.h"
#include "forward.h"
#include "hessian.h"
#include "softmax.h"

namespace custom_ops {

// Calls f with a number of the type in which the input is stored.
template <typename F>
void dispatch_storage(c10::ScalarType type, F f) {
  switch (type) {
    case c10::kDouble: return f(double());
    case c10::kBFloat16: return f(c10::BFloat16());
    case c10::kHalf: return f(c10::Half());
    default: return f(float());
  }
}

// float64 is computed in double, everything else in float.
template <typename F>
void dispatch(c10::ScalarType type, F f) {
  if (type == c10::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

inline Tensor softmax(const Tensor& input, int64_t dim, bool log) {
  const View z = view(input, dim), y = fresh_like(z);
  dispatch_storage(input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    log ? log_softmax_kernel<T>(z, y) : softmax_kernel<T>(z, y);
  });
  return unview(y, dim);
}

// The three maps of two tensors, by name.
enum class Map { contract, log_softmax_vjp, log_softmax_jvp };

template <Map map>
Tensor mapped(const Tensor& p, const Tensor& v, int64_t dim) {
  const View x = view(p, dim), u = view_like(x, v, dim), out = fresh_like(u);
  dispatch_storage(p.scalar_type(), [&](auto number) {
    using T = decltype(number);
    if constexpr (map == Map::contract) contract_kernel<T>(x, u, out);
    if constexpr (map == Map::log_softmax_vjp) log_softmax_vjp_kernel<T>(x, u, out);
    if constexpr (map == Map::log_softmax_jvp) log_softmax_jvp_kernel<T>(x, u, out);
  });
  return unview(out, dim);
}

// Σ x in double, by one thread.
template <typename acc_t>
double added(const acc_t* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lanes[j] += x[i + j];
  }
  for (; i < n; ++i) lanes[0] += x[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// Σ x in double, by all threads. The order of the additions depends on the length alone.
template <typename acc_t>
acc_t total(const acc_t* x, int64_t n) {
  if (n <= WORK) return acc_t(added(x, n));
  std::vector<double> parts((n + WORK - 1) / WORK);
  at::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t part, int64_t end) {
    for (; part < end; ++part) {
      parts[part] = added(x + part * WORK, std::min(WORK, n - part * WORK));
    }
  });
  return acc_t(added(parts.data(), int64_t(parts.size())));
}

// How many of n numbers `is` holds for.
template <typename Is>
int64_t counted(const int64_t* t, int64_t n, Is is) {
  const auto count = [=](int64_t first, int64_t end, int64_t found) {
    for (; first < end; ++first) found += is(t[first]);
    return found;
  };
  return at::parallel_reduce(0, n, WORK, int64_t(0), count, std::plus<int64_t>());
}

inline Tensor total(const Tensor& x) {
  const Tensor from = x.contiguous();
  Tensor sum = at::empty({}, x.options());
  dispatch(x.scalar_type(), [&](auto acc) {
    using acc_t = decltype(acc);
    *sum.mutable_data_ptr<acc_t>() = total(from.const_data_ptr<acc_t>(), from.numel());
  });
  return sum;
}

inline void check_labels(const Tensor& labels, int64_t classes, int64_t ignore_index) {
  const int64_t *t = labels.const_data_ptr<int64_t>(), n = labels.numel();
  const auto is_good = [=](int64_t label) {
    // as a number without a sign, one below 0 is large
    return (uint64_t(label) < uint64_t(classes)) | (label == ignore_index);
  };
  if (counted(t, n, is_good) == n) return;
  for (int64_t r = 0; r < n; ++r) {
    if (is_good(t[r])) continue;
    std::ostringstream where;
    int64_t rest = r, block = n;
    for (int64_t d = 0; d < labels.dim(); ++d) {
      block /= labels.size(d);
      where << (d ? ", " : "[") << rest / block;
      rest %= block;
    }
    if (labels.dim()) where << "]";
    std::ostringstream range;
    if (classes) range << "0 to " << classes - 1 << ", or ";
    TORCH_CHECK_INDEX(false, "target", where.str(), " is ", t[r], ", out of range for ", classes,
                      " classes (", range.str(), "ignore_index=", ignore_index, ")");
  }
}

inline Tensor as_labels(const Tensor& target) { return target.to(c10::kLong).contiguous(); }

// A cross-entropy, in the layouts in which the kernels read it.
struct Inputs {
  View x;
  Tensor target, weight;
  const Options& o;

  Inputs(const Tensor& input, const Tensor& target_, const std::optional<Tensor>& weight_,
         const Options& o)
      : x(view(input, o.dim)), o(o) {
    target =
        target_.is_floating_point() ? view_like(x, target_, o.dim).tensor : as_labels(target_);
    if (weight_) weight = weight_->contiguous();
  }

  template <typename acc_t>
  Problem<acc_t> problem() const {
    Target<acc_t> t;
    if (target.is_floating_point()) {
      t.probabilities = Source<acc_t>(target);
    } else {
      t.labels = target.const_data_ptr<int64_t>();
    }
    return {x, t, weight.defined() ? weight.const_data_ptr<acc_t>() : nullptr, o};
  }
};

// What the forward finds, one a row; the last two are empty unless they are wanted.
struct Found {
  Tensor loss, M, L, prediction, entropy;
};

// `input` is of the options' dtype or of a half type, labels of any integer type that int64 holds,
// the weights of that dtype.
inline Found cross_entropy(const Tensor& input, const Tensor& target,
                           const std::optional<Tensor>& weight, const Options& o) {
  const Inputs in(input, target, weight, o);
  if (!target.is_floating_point()) check_labels(in.target, in.x.classes, o.ignore_index);
  const auto rows = row_sizes(input, o.dim);
  const auto of_stats = o.stats ? rows : std::vector<int64_t>{0};
  const auto type = input.options().dtype(o.dtype);
  const Found found{at::empty(rows, type), at::empty(rows, type), at::empty(rows, type),
                    at::empty(of_stats, type.dtype(c10::kLong)), at::empty(of_stats, type)};
  for (const auto& fresh : {found.loss, found.M, found.L, found.prediction, found.entropy}) {
    advise_huge_pages(fresh);
  }
  if (in.x.classes == 0) {
    for (const auto& empty : {found.loss, found.M, found.L, found.entropy}) empty.zero_();
    found.prediction.fill_(-1);
    return found;
  }
  dispatch_storage(input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using acc_t = acc_of<T>;
    RowResults<acc_t> results{found.loss.mutable_data_ptr<acc_t>(),
                              found.M.mutable_data_ptr<acc_t>(),
                              found.L.mutable_data_ptr<acc_t>()};
    if (o.stats) {
      results.prediction = found.prediction.mutable_data_ptr<int64_t>();
      results.entropy = found.entropy.mutable_data_ptr<acc_t>();
    }
    cross_entropy_kernel<T>(in.problem<acc_t>(), results);
  });
  return found;
}

// What a backward is given, one number a row. g may be one number for all rows, as the backward of
// a sum expands it.
struct Rows {
  bool one;
  Tensor g, q, M, L;

  Rows(const Tensor& g_, const std::optional<Tensor>& q_, const Tensor& M_, const Tensor& L_)
      : one(std::all_of(g_.strides().begin(), g_.strides().end(), [](auto s) { return !s; })),
        g(one ? g_ : g_.contiguous()),
        q(q_ ? q_->contiguous() : Tensor()),
        M(M_.contiguous()),
        L(L_.contiguous()) {}

  template <typename acc_t>
  Upstream<acc_t> upstream() const {
    return {{g.const_data_ptr<acc_t>(), one ? 0 : 1},
            {q.defined() ? q.const_data_ptr<acc_t>() : nullptr, 1},
            M.const_data_ptr<acc_t>(),
            L.const_data_ptr<acc_t>()};
  }
};

inline void write_vjp(const Inputs& in, const Rows& rows, const View& out) {
  dispatch_storage(in.x.tensor.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using acc_t = acc_of<T>;
    cross_entropy_vjp_kernel<T>(in.problem<acc_t>(), rows.upstream<acc_t>(), out);
  });
}

// z' ⊙ (a·p − g·ỹ), in fresh memory or over the input. Then the input's version is raised.
inline Tensor cross_entropy_vjp(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& weight, const Rows& rows,
                                const Options& o) {
  const Tensor input = o.inplace ? logits.detach() : logits;
  const Inputs in(input, target, weight, o);
  const bool in_place = o.inplace && in.x.tensor.is_alias_of(input);
  const View out = in_place ? in.x : fresh_like(in.x);
  write_vjp(in, rows, out);
  if (!o.inplace) return unview(out, o.dim);
  if (in_place) {
    input.unsafeGetTensorImpl()->bump_version();
  } else {
    input.copy_(unview(out, o.dim));
  }
  return input;
}

// The same in `out`, both (rows, classes).
inline void cross_entropy_vjp_out(const Tensor& logits, const Tensor& target,
                                  const std::optional<Tensor>& weight, const Rows& rows,
                                  const Options& o, const Tensor& out) {
  const Inputs in(logits, target, weight, o);
  const View written = view(out, o.dim);
  TORCH_CHECK(out.dim() == 2 && o.dim == 1 && written.tensor.is_alias_of(out),
              "out must be rows of classes");
  write_vjp(in, rows, written);
}

// Writes dz over z and its change along u over u, both (rows, classes) and contiguous. Returns
// ∂⟨u, dz⟩/∂g and ∂⟨u, dz⟩/∂q.
inline std::tuple<Tensor, Tensor> cross_entropy_hvp(const Tensor& z, const Tensor& target,
                                                    const std::optional<Tensor>& weight,
                                                    const Tensor& u, const Rows& rows,
                                                    const Options& o) {
  const Inputs in(z.detach(), target, weight, o);
  const Tensor direction = u.detach();
  TORCH_CHECK(z.is_contiguous() && u.is_contiguous(), "z and u must be contiguous");
  Tensor d_g = at::empty_like(rows.M), d_q = at::empty_like(rows.M);
  dispatch(o.dtype, [&](auto acc) {
    using acc_t = decltype(acc);
    hessian_kernel<acc_t>(in.problem<acc_t>(), rows.upstream<acc_t>(), direction,
                          {d_g.mutable_data_ptr<acc_t>(), d_q.mutable_data_ptr<acc_t>()});
  });
  for (const auto& changed : {in.x.tensor, direction}) {
    changed.unsafeGetTensorImpl()->bump_version();
  }
  return {d_g, d_q};
}

}  // namespace custom_ops
