// Autograd nodes for the plain case: what the Python Functions do, with the same kernels and to the
// same bits, for a batch so small that Python's frames would be most of the time.
//
// `plain` is where the choice is made. Where it says no, or where a backward is to be differentiated
// or batched, the Python Functions answer.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <memory>
#include <string>

#include "operators.h"

namespace custom_ops {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The Python functions that answer a node's backward where it is to be differentiated or batched.
inline std::map<std::string, py::object>& vjps() {
  static auto* kept = new std::map<std::string, py::object>;  // never destroyed: nor would Python
  return *kept;
}

// Whether nothing but autograd's reverse mode looks at t.
inline bool plain(const Tensor& t) {
  static const c10::DispatchKeySet others({
      c10::DispatchKey::Python,
      c10::DispatchKey::PythonTLSSnapshot,
      c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::FuncTorchGradWrapper,
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchDynamicLayerBackMode,
      c10::DispatchKey::Batched,
      c10::DispatchKey::Functionalize,
      c10::DispatchKey::Conjugate,
      c10::DispatchKey::Negative,
      c10::DispatchKey::ZeroTensor,
      c10::DispatchKey::Tracer,
  });
  return t.device().is_cpu() && t.layout() == c10::kStrided && !t.key_set().has_any(others) &&
      !t._fw_grad(0).defined();
}

inline bool surroundings_plain() {
  static const c10::DispatchKeySet modes({
      c10::DispatchKey::Python,
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchVmapMode,
      c10::DispatchKey::VmapMode,
      c10::DispatchKey::Functionalize,
      c10::DispatchKey::PreDispatch,
      c10::DispatchKey::Tracer,
  });
  return !c10::impl::tls_local_dispatch_key_set().included_.has_any(modes) &&
      !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
      at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

inline bool plain(py::handle t) {
  return THPVariable_CheckExact(t.ptr()) && plain(THPVariable_Unpack(t.ptr()));
}

inline bool differentiable(const Tensor& t) {
  return torch::autograd::GradMode::is_enabled() && t.requires_grad();
}

// Whether the backward is one that the kernels can do: not itself differentiated, nor batched.
inline bool plain_backward(const Tensor& g) {
  return !torch::autograd::GradMode::is_enabled() && plain(g) && surroundings_plain();
}

template <typename... Args>
Tensor python_vjp(const char* name, const Args&... args) {
  py::gil_scoped_acquire gil;
  return vjps().at(name)(args...).template cast<Tensor>();
}

template <bool log>
struct Softmax : torch::autograd::Function<Softmax<log>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t dim) {
    Tensor y = softmax(input, dim, log);
    ctx->save_for_backward({y});
    ctx->saved_data["dim"] = dim;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor &v = gradients[0], y = ctx->get_saved_variables()[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (!v.defined()) return {Tensor(), Tensor()};
    if (plain_backward(v)) {
      return {log ? mapped<Map::log_softmax_vjp>(y, v, dim) : mapped<Map::contract>(y, v, dim),
              Tensor()};
    }
    return {python_vjp(log ? "log_softmax" : "softmax", y, v, dim), Tensor()};
  }
};

// The result, or None where the Python Function is to answer.
template <bool log>
py::object softmax_node(py::handle input, int64_t dim) {
  if (!plain(input) || !surroundings_plain()) return py::none();
  const Tensor x = THPVariable_Unpack(input.ptr());
  Tensor y;
  {
    py::gil_scoped_release no_gil;
    y = Softmax<log>::apply(x, dim);
  }
  return py::cast(y);
}

enum class Reduction { none, sum, mean };

// A cross-entropy but for its tensors.
struct __attribute__((visibility("hidden"))) Plan : torch::CustomClassHolder {
  Options o;
  int64_t dim;
  c10::ScalarType dtype, result_dtype;
  Reduction reduction;
  double normalizer;  // 0 for none
  bool inplace;
  py::object python_options;

  Plan(py::object options, const std::string& reduction_name, std::optional<double> denominator,
       c10::ScalarType result)
      : o{options.attr("ignore_index").cast<int64_t>(),
          options.attr("label_smoothing").cast<double>(), options.attr("z_loss").cast<double>(),
          options.attr("logit_scale").cast<double>(),
          options.attr("softcap").cast<std::optional<double>>().value_or(0)},
        dim(options.attr("dim").cast<int64_t>()),
        dtype(options.attr("dtype").cast<c10::ScalarType>()),
        result_dtype(result),
        reduction(reduction_name == "none"      ? Reduction::none
                      : reduction_name == "sum" ? Reduction::sum
                                                : Reduction::mean),
        normalizer(denominator.value_or(0)),
        inplace(options.attr("inplace").cast<bool>()),
        python_options(std::move(options)) {}

  ~Plan() override {
    py::gil_scoped_acquire gil;
    python_options = py::object();
  }
};

// The denominator of the mean.
template <typename acc_t>
acc_t mean_rows(const Plan& plan, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight) {
  if (plan.normalizer != 0) return acc_t(plan.normalizer);
  const int64_t classes = input.size(plan.dim);
  if (target.is_floating_point()) return acc_t(double(input.numel()) / double(classes));
  const Tensor labels = target.contiguous(), w = weight ? weight->contiguous() : Tensor();
  const int64_t* t = labels.const_data_ptr<int64_t>();
  if (!weight) {
    return acc_t(std::count_if(t, t + labels.numel(),
                               [&](int64_t label) { return label != plan.o.ignore_index; }));
  }
  std::vector<acc_t> rows(labels.numel());
  std::transform(t, t + labels.numel(), rows.begin(), [&](int64_t label) {
    return label == plan.o.ignore_index ? acc_t(0) : w.const_data_ptr<acc_t>()[label];
  });
  return total(rows.data(), labels.numel());
}

// What the rows receive: g, or one number for all of them.
inline Tensor upstream(const Tensor& g, const Plan& plan, double denominator) {
  if (plan.reduction == Reduction::none) return g.to(plan.dtype);
  Tensor all = at::empty({}, g.options().dtype(plan.dtype));
  dispatch(plan.dtype, [&](auto acc) {
    using acc_t = decltype(acc);
    *all.mutable_data_ptr<acc_t>() = Source<acc_t>(g)[0] / acc_t(denominator);
  });
  return all;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const std::optional<Tensor>& weight, const c10::intrusive_ptr<Plan>& plan) {
    auto [loss, M, L, _] =
        cross_entropy(input, target, weight, plan->dim, plan->dtype, false, plan->o);
    double denominator = 1;
    if (plan->reduction != Reduction::none) {
      loss = total(loss);
      if (plan->reduction == Reduction::mean) {
        dispatch(plan->dtype, [&](auto acc) {
          using acc_t = decltype(acc);
          const acc_t rows = mean_rows<acc_t>(*plan, input, target, weight);
          *loss.mutable_data_ptr<acc_t>() /= rows;
          denominator = rows;
        });
      }
    }
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), M, L});
    ctx->saved_data["plan"] = c10::IValue::make_capsule(plan);
    ctx->saved_data["denominator"] = denominator;
    return loss.to(plan->result_dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &input = saved[0], &target = saved[1], &M = saved[3],
                 &L = saved[4];
    std::optional<Tensor> weight;
    if (saved[2].defined()) weight = saved[2];
    const auto plan =
        c10::static_intrusive_pointer_cast<Plan>(ctx->saved_data["plan"].toCapsule());
    const double denominator = ctx->saved_data["denominator"].toDouble();
    Tensor dx;
    if (g.defined() && plain_backward(g)) {
      dx = cross_entropy_vjp(input, target, weight, upstream(g, *plan, denominator), std::nullopt,
                             M, L, plan->dim, plan->inplace, plan->o);
    } else if (g.defined()) {
      dx = python_vjp("cross_entropy", input, target, weight, g, M, L, denominator,
                      plan->python_options);
    }
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

inline py::object cross_entropy_node(py::handle input, py::handle target, py::handle weight,
                                     py::object options, const std::string& reduction,
                                     std::optional<double> normalizer,
                                     c10::ScalarType result_dtype) {
  if (!plain(input) || !plain(target) || !(weight.is_none() || plain(weight)) ||
      !surroundings_plain()) {
    return py::none();
  }
  const Tensor x = THPVariable_Unpack(input.ptr()), t = THPVariable_Unpack(target.ptr());
  std::optional<Tensor> w;
  if (!weight.is_none()) w = THPVariable_Unpack(weight.ptr());
  const auto plan =
      c10::make_intrusive<Plan>(std::move(options), reduction, normalizer, result_dtype);
  const auto reads = [&](const Tensor& y) {
    return y.scalar_type() == plan->dtype ||
        (plan->dtype == c10::kFloat &&
         (y.scalar_type() == c10::kBFloat16 || y.scalar_type() == c10::kHalf));
  };
  if (!reads(x) || !(t.scalar_type() == c10::kLong || (t.is_floating_point() && reads(t))) ||
      differentiable(t) || (w && (differentiable(*w) || w->scalar_type() != plan->dtype)) ||
      x.numel() == 0) {
    return py::none();
  }
  Tensor loss;
  {
    py::gil_scoped_release no_gil;
    loss = CrossEntropy::apply(x, t, w, plan);
  }
  return py::cast(loss);
}

}  // namespace custom_ops
