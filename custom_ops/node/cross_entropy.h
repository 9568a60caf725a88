// Cross-entropy as an autograd node.
#pragma once

#include "plan.h"
#include "softmax.h"

namespace custom_ops {

// The denominator of the mean.
template <typename acc_t>
acc_t mean_rows(const Plan& plan, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight) {
  if (plan.normalizer != 0) return acc_t(plan.normalizer);
  const int64_t classes = input.size(plan.o.dim);
  if (target.is_floating_point()) return acc_t(double(input.numel()) / double(classes));
  const Tensor labels = as_labels(target), w = weight ? weight->contiguous() : Tensor();
  const int64_t* t = labels.const_data_ptr<int64_t>();
  if (!weight) {
    return acc_t(counted(t, labels.numel(), [ignored = plan.o.ignore_index](int64_t label) {
      return label != ignored;
    }));
  }
  const Tensor rows = at::empty(labels.sizes(), w.options());
  acc_t* of_row = rows.mutable_data_ptr<acc_t>();
  at::parallel_for(0, labels.numel(), WORK,
                   [=, of_class = w.const_data_ptr<acc_t>()](int64_t r, int64_t end) {
                     for (; r < end; ++r) {
                       of_row[r] = t[r] == plan.o.ignore_index ? acc_t(0) : of_class[t[r]];
                     }
                   });
  return total(of_row, labels.numel());
}

// The upstream gradient of the rows: g itself, or one number for all, divided by that of a mean.
inline Tensor upstream(const Tensor& g, const Plan& plan, const Tensor& divisor) {
  if (plan.reduction == Reduction::none) return g.to(plan.o.dtype);
  Tensor all = at::empty({}, g.options().dtype(plan.o.dtype));
  dispatch(plan.o.dtype, [&](auto acc) {
    using acc_t = decltype(acc);
    const acc_t rows = divisor.defined() ? *divisor.const_data_ptr<acc_t>() : acc_t(1);
    *all.mutable_data_ptr<acc_t>() = Source<acc_t>(g)[0] / rows;
  });
  return all;
}

inline Tensor or_none(const std::optional<Tensor>& t) { return t.value_or(Tensor()); }

inline std::optional<Tensor> given(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  // The loss, and with stats lse, the prediction and the entropy.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const Plan* made) {
    const Plan& plan = *made;
    plan.save(ctx);
    ctx->set_materialize_grads(false);
    Tensor loss, M, L, divisor;  // The Function saves the same tensors, in this order.
    variable_list stats;
    const Options& o = plan.o;
    if (const Launcher* there = launcher_for(input)) {
      const char* reduction = REDUCTIONS[int(plan.reduction)];
      const auto found = launched(*there, "cross_entropy", plan.key(Launched::cross_entropy),
                                  {input, target, or_none(weight)}, o.dim, o.dtype, o.ignore_index,
                                  plan.numbers(), o.stats, plan.result_dtype, reduction,
                                  plan.normalizer);
      loss = found[0], M = found[1], L = found[2], divisor = found[3];
      if (o.stats) stats = {M + L, found[4], found[5]};
    } else {
      const Found found = cross_entropy(input, target, weight, o);
      loss = found.loss, M = found.M, L = found.L;
      // Integers have no gradient; marking them would be refused by compiled autograd.
      if (o.stats) stats = {M + L, found.prediction, found.entropy};
      if (plan.reduction != Reduction::none) loss = total(loss);
      if (plan.reduction == Reduction::mean) {
        divisor = at::empty({}, loss.options());
        dispatch(plan.o.dtype, [&](auto acc) {
          using acc_t = decltype(acc);
          const acc_t rows = mean_rows<acc_t>(plan, input, target, weight);
          *divisor.mutable_data_ptr<acc_t>() = rows;
          *loss.mutable_data_ptr<acc_t>() /= rows;
        });
      }
      loss = loss.to(plan.result_dtype);
    }
    ctx->save_for_backward({input, target, or_none(weight), M, L, divisor});
    stats.insert(stats.begin(), loss);
    return stats;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &target = saved[1], &M = saved[3], &L = saved[4];
    // Without a gradient of the loss nothing is divided, as the divisor may be 0.
    const Tensor divisor = gradients[0].defined() ? saved[5] : Tensor();
    const std::optional<Tensor> weight = given(saved[2]), rows = given(divisor);
    const Plan plan = Plan::saved(ctx);
    const Launcher* there = launcher_for(input);
    const Options& o = plan.o;
    Tensor g = gradients[0], q, e, dx;
    if (o.stats) q = gradients[1], e = gradients[3];
    if (!g.defined() && (q.defined() || e.defined())) g = at::zeros({}, M.options());
    if (!g.defined()) {
    } else if (e.defined() || !plain_backward(g) || (q.defined() && !plain_backward(q))) {
      py::gil_scoped_acquire gil;
      dx = python_vjp("cross_entropy", input, target, weight, g, given(q), M, L, given(e), rows,
                      o.dim, o.dtype, o.ignore_index, plan.numbers(), o.inplace);
    } else if (there) {
      const auto found = launched(*there, "cross_entropy_vjp", plan.key(Launched::vjp),
                                  {input, target, saved[2], g, q, M, L, divisor}, o.dim, o.dtype,
                                  o.ignore_index, plan.numbers(), o.inplace);
      dx = o.inplace ? input.detach() : found[0];
      if (o.inplace) dx.unsafeGetTensorImpl()->bump_version();
    } else {
      const Rows upstream_rows(upstream(g, plan, divisor), given(q), M, L);
      dx = cross_entropy_vjp(input, target, weight, upstream_rows, o);
    }
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

// The loss, with stats a list that begins with it, or None to decline.
inline py::object cross_entropy_node(py::handle input, py::handle target, py::handle weight,
                                     const py::args& options) {
  if (!plain(input) || !plain(target) || !(weight.is_none() || plain(weight)) ||
      !surroundings_plain()) {
    return py::none();
  }
  const Tensor x = THPVariable_Unpack(input.ptr()), t = THPVariable_Unpack(target.ptr());
  std::optional<Tensor> w;
  if (!weight.is_none()) w = THPVariable_Unpack(weight.ptr());
  if (differentiable(t) || (w && differentiable(*w))) return py::none();
  if (t.device() != x.device() || (w && w->device() != x.device())) return py::none();
  const auto plan = plan_of(x, t, w, Given(options));
  if (!plan) return py::none();
  if (w) w = w->to(plan->o.dtype);
  variable_list found;
  {
    py::gil_scoped_release no_gil;
    found = CrossEntropy::apply(x, t, w, &*plan);
  }
  return plan->o.stats ? py::cast(found) : py::cast(found[0]);
}

}  // namespace custom_ops
