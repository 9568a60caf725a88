// The kernels as functions of tensors. They trust their arguments but for one thing: no label is
// read through before it is known to be a class. What a saved graph or anybody may call checks its
// arguments first (`check.h`).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <optional>
#include <sstream>
#include <tuple>

#include "check.h"
#include "cross_entropy.h"
#include "hessian.h"
#include "softmax.h"

namespace custom_ops {

// Calls f with a number of the type that the input's numbers lie in memory as.
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

// Σ x in double, in an order that depends on nothing but the length.
template <typename acc_t>
acc_t total(const acc_t* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lanes[j] += x[i + j];
  }
  for (; i < n; ++i) lanes[0] += x[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return acc_t(sum);
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
  const int64_t* t = labels.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < labels.numel(); ++r) {
    if ((t[r] >= 0 && t[r] < classes) || t[r] == ignore_index) continue;
    std::ostringstream where;
    int64_t rest = r, block = labels.numel();
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

// What the functions below read, in the layouts in which the kernels read it.
struct Inputs {
  View x;
  Tensor target, weight;

  Inputs(const Tensor& input, const Tensor& target_, const std::optional<Tensor>& weight_,
         int64_t dim)
      : x(view(input, dim)) {
    target = target_.is_floating_point() ? view_like(x, target_, dim).tensor : target_.contiguous();
    if (weight_) weight = weight_->contiguous();
  }

  template <typename acc_t>
  Problem<acc_t> problem(const Options& o) const {
    Target<acc_t> t;
    if (target.is_floating_point()) {
      t.probabilities = Source<acc_t>(target);
    } else {
      t.labels = target.const_data_ptr<int64_t>();
    }
    return {x, t, weight.defined() ? weight.const_data_ptr<acc_t>() : nullptr, o};
  }
};

// ℓ, M, L and the prediction (empty unless it is wanted), one a row, as `dtype`. `input` is of
// `dtype` or of a half type, labels are int64, and the weights are of `dtype`.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, int64_t dim,
    c10::ScalarType dtype, bool predict, const Options& o) {
  const Inputs in(input, target, weight, dim);
  if (!target.is_floating_point()) check_labels(in.target, in.x.classes, o.ignore_index);
  const auto rows = row_sizes(input, dim);
  const auto options = input.options().dtype(dtype);
  Tensor loss = at::empty(rows, options);
  Tensor M = at::empty(rows, options), L = at::empty(rows, options);
  Tensor prediction = predict ? at::empty(rows, options.dtype(c10::kLong))
                              : at::empty({0}, options.dtype(c10::kLong));
  if (in.x.classes == 0) {
    for (const auto& empty : {loss, M, L}) empty.zero_();
    prediction.fill_(-1);
    return {loss, M, L, prediction};
  }
  dispatch_storage(input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using acc_t = acc_of<T>;
    cross_entropy_kernel<T>(
        in.problem<acc_t>(o),
        {loss.mutable_data_ptr<acc_t>(), M.mutable_data_ptr<acc_t>(), L.mutable_data_ptr<acc_t>(),
         predict ? prediction.mutable_data_ptr<int64_t>() : nullptr});
  });
  return {loss, M, L, prediction};
}

// What a backward is given, one a row; g also one for all, as a sum over the rows hands it on.
struct Given {
  bool one;
  Tensor g, h, M, L;

  Given(const Tensor& g_, const std::optional<Tensor>& h_, const Tensor& M_, const Tensor& L_)
      : one(std::all_of(g_.strides().begin(), g_.strides().end(), [](auto s) { return !s; })),
        g(one ? g_ : g_.contiguous()),
        h(h_ ? h_->contiguous() : Tensor()),
        M(M_.contiguous()),
        L(L_.contiguous()) {}

  template <typename acc_t>
  Upstream<acc_t> upstream() const {
    return {{g.const_data_ptr<acc_t>(), one ? 0 : 1},
            {h.defined() ? h.const_data_ptr<acc_t>() : nullptr, 1},
            M.const_data_ptr<acc_t>(),
            L.const_data_ptr<acc_t>()};
  }
};

// z'(x) ⊙ (a·p − g·ỹ), in fresh memory or in that of the input, whose version is raised then.
inline Tensor cross_entropy_vjp(const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& weight, const Tensor& g,
                                const std::optional<Tensor>& h, const Tensor& M, const Tensor& L,
                                int64_t dim, bool inplace, const Options& o) {
  const Tensor input = inplace ? logits.detach() : logits;
  const Inputs in(input, target, weight, dim);
  const bool in_place = inplace && in.x.tensor.is_alias_of(input);
  const View out = in_place ? in.x : fresh_like(in.x);
  const Given given(g, h, M, L);
  dispatch_storage(input.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using acc_t = acc_of<T>;
    cross_entropy_vjp_kernel<T>(in.problem<acc_t>(o), given.upstream<acc_t>(), out);
  });
  if (!inplace) return unview(out, dim);
  if (in_place) {
    input.unsafeGetTensorImpl()->bump_version();
  } else {
    input.copy_(unview(out, dim));
  }
  return input;
}

// The gradient in the place of z and its change along u in that of u, both (rows, classes) and
// contiguous; returns what u is to g and h.
inline std::tuple<Tensor, Tensor> cross_entropy_hvp(const Tensor& z, const Tensor& target,
                                                    const std::optional<Tensor>& weight,
                                                    const Tensor& u, const Tensor& g,
                                                    const std::optional<Tensor>& h,
                                                    const Tensor& M, const Tensor& L,
                                                    const Options& o) {
  const Inputs in(z.detach(), target, weight, 1);
  const Given given(g, h, M, L);
  const Tensor direction = u.detach();
  TORCH_CHECK(z.is_contiguous() && u.is_contiguous(), "z and u must be contiguous");
  Tensor d_g = at::empty_like(given.M), d_h = at::empty_like(given.M);
  dispatch(M.scalar_type(), [&](auto acc) {
    using acc_t = decltype(acc);
    hessian_kernel<acc_t>(in.problem<acc_t>(o), given.upstream<acc_t>(), direction,
                          {d_g.mutable_data_ptr<acc_t>(), d_h.mutable_data_ptr<acc_t>()});
  });
  for (const auto& changed : {in.x.tensor, direction}) {
    changed.unsafeGetTensorImpl()->bump_version();
  }
  return {d_g, d_h};
}

}  // namespace custom_ops
