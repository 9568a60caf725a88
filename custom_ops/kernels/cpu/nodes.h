// Autograd nodes for the plain case: what the Python Functions do, with the same kernels and to the
// same bits, for a batch so small that Python's frames would be most of the time.
//
// `plain` and `plan_of` are where the choice is made. Where they say no, or where a backward is to
// be differentiated or batched, the Python Functions answer. The cross-entropy stands for another
// device as well, if somebody is there to compute on it (`Launcher`).
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
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

// The Python functions that compute a cross-entropy and its gradient on another device, of so many
// rows at most: with more, there is so much to do that Python's frames are no matter.
struct Launcher {
  int64_t most_rows;
  py::object forward, backward;
};

inline std::map<c10::DeviceType, Launcher>& launchers() {
  static auto* kept = new std::map<c10::DeviceType, Launcher>;
  return *kept;
}

inline const Launcher* launcher_for(const Tensor& t) {
  const auto found = launchers().find(t.device().type());
  return found == launchers().end() ? nullptr : &found->second;
}

// Whether t is a dense strided tensor that nothing but autograd's reverse mode looks at.
inline bool plain(const Tensor& t) {
  static const c10::DispatchKeySet known({
      c10::DispatchKey::CPU,
      c10::DispatchKey::CUDA,
      c10::DispatchKey::ADInplaceOrView,
      c10::DispatchKey::AutogradCPU,
      c10::DispatchKey::AutogradCUDA,
      c10::DispatchKey::AutocastCPU,
      c10::DispatchKey::AutocastCUDA,
  });
  return (t.device().is_cpu() || launcher_for(t)) &&
      !(t.key_set().raw_repr() & ~known.raw_repr()) && !t._fw_grad(0).defined();
}

// Whether the thread is as it is without any mode, transform or tracer; autocast may be on.
inline bool surroundings_plain() {
  static const auto known = c10::autocast_dispatch_keyset |
      c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return !(c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~known.raw_repr()) &&
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
  if (!x.device().is_cpu()) return py::none();
  Tensor y;
  {
    py::gil_scoped_release no_gil;
    y = Softmax<log>::apply(x, dim);
  }
  return py::cast(y);
}

enum class Reduction { none, sum, mean };
constexpr const char* REDUCTIONS[] = {"none", "sum", "mean"};

// A cross-entropy but for its tensors.
struct Plan {
  Options o;
  int64_t dim;
  c10::ScalarType dtype, result_dtype;
  Reduction reduction;
  double normalizer;  // 0 for none
  bool inplace;

  // Kept by autograd as plain numbers, which compiled autograd can hash.
  void save(AutogradContext* ctx) const {
    ctx->saved_data["integers"] = std::vector<int64_t>{
        o.ignore_index, dim, int64_t(dtype), int64_t(result_dtype), int64_t(reduction), inplace};
    ctx->saved_data["numbers"] = std::vector<double>{
        o.label_smoothing, o.z_loss, o.logit_scale, o.softcap, normalizer};
  }

  static Plan saved(AutogradContext* ctx) {
    const auto i = ctx->saved_data["integers"].toIntVector();
    const auto x = ctx->saved_data["numbers"].toDoubleVector();
    return {{i[0], x[0], x[1], x[2], x[3]}, i[1], c10::ScalarType(i[2]), c10::ScalarType(i[3]),
            Reduction(i[4]), x[4], i[5] != 0};
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

// What the rows receive: g, or one number for all of them, divided by that of a mean.
inline Tensor upstream(const Tensor& g, const Plan& plan, const Tensor& divisor) {
  if (plan.reduction == Reduction::none) return g.to(plan.dtype);
  Tensor all = at::empty({}, g.options().dtype(plan.dtype));
  dispatch(plan.dtype, [&](auto acc) {
    using acc_t = decltype(acc);
    const acc_t rows = divisor.defined() ? *divisor.const_data_ptr<acc_t>() : acc_t(1);
    *all.mutable_data_ptr<acc_t>() = Source<acc_t>(g)[0] / rows;
  });
  return all;
}

inline std::optional<double> softcap_of(const Options& o) {
  return o.softcap ? std::optional<double>(o.softcap) : std::nullopt;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const std::optional<Tensor>& weight, const Plan* made) {
    const Plan& plan = *made;
    plan.save(ctx);
    Tensor loss, M, L, divisor;  // of a mean; the Function saves these as well, in this order
    if (const Launcher* there = launcher_for(input)) {
      const Options& o = plan.o;
      py::gil_scoped_acquire gil;
      std::optional<Tensor> n;
      std::tie(loss, M, L, n) =
          there
              ->forward(input, target, weight, plan.dim, plan.dtype, plan.result_dtype,
                        REDUCTIONS[int(plan.reduction)], plan.normalizer, o.ignore_index,
                        o.label_smoothing, o.z_loss, o.logit_scale, softcap_of(o))
              .cast<std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>>>();
      divisor = n.value_or(Tensor());
    } else {
      std::tie(loss, M, L, std::ignore) =
          cross_entropy(input, target, weight, plan.dim, plan.dtype, false, plan.o);
      if (plan.reduction != Reduction::none) loss = total(loss);
      if (plan.reduction == Reduction::mean) {
        divisor = at::empty({}, loss.options());
        dispatch(plan.dtype, [&](auto acc) {
          using acc_t = decltype(acc);
          const acc_t rows = mean_rows<acc_t>(plan, input, target, weight);
          *divisor.mutable_data_ptr<acc_t>() = rows;
          *loss.mutable_data_ptr<acc_t>() /= rows;
        });
      }
      loss = loss.to(plan.result_dtype);
    }
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), M, L, divisor});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &g = gradients[0], &input = saved[0], &target = saved[1], &M = saved[3],
                 &L = saved[4], &divisor = saved[5];
    std::optional<Tensor> weight;
    if (saved[2].defined()) weight = saved[2];
    const Plan plan = Plan::saved(ctx);
    const Launcher* there = launcher_for(input);
    const Options& o = plan.o;
    const auto rows = divisor.defined() ? std::optional<Tensor>(divisor) : std::nullopt;
    Tensor dx;
    if (!g.defined()) {
    } else if (!plain_backward(g)) {
      py::gil_scoped_acquire gil;
      dx = python_vjp("cross_entropy", input, target, weight, g, M, L, rows, plan.dim, plan.dtype,
                      o.ignore_index, o.label_smoothing, o.z_loss, o.logit_scale, softcap_of(o),
                      false, plan.inplace);
    } else if (there) {
      py::gil_scoped_acquire gil;
      dx = there
               ->backward(input, target, weight, g, M, L, rows, plan.dim, plan.inplace,
                          o.ignore_index, o.label_smoothing, o.z_loss, o.logit_scale, softcap_of(o))
               .cast<Tensor>();
    } else {
      dx = cross_entropy_vjp(input, target, weight, upstream(g, plan, divisor), std::nullopt, M, L,
                             plan.dim, plan.inplace, o);
    }
    return {dx, Tensor(), Tensor(), Tensor()};
  }
};

// A finite number of Python's own, at least `least`.
inline bool read_number(py::handle value, double least, double& number) {
  if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr())) return false;
  number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred()) {  // too large an int
    PyErr_Clear();
    return false;
  }
  return std::isfinite(number) && number >= least;
}

// The plan for arguments that are all as they should be; none where a second look is needed, at
// what is wrong or at what is rare.
inline std::optional<Plan> plan_of(const Tensor& x, const Tensor& target,
                                        const std::optional<Tensor>& weight,
                                        py::handle ignore_index, py::handle reduction,
                                        py::handle label_smoothing, py::handle z_loss,
                                        py::handle softcap, py::handle logit_scale,
                                        py::handle normalizer, py::handle dtype,
                                        py::handle inplace) {
  Plan plan;
  Options& o = plan.o;
  int overflow = 0;
  if (!PyLong_CheckExact(ignore_index.ptr())) return {};
  o.ignore_index = PyLong_AsLongLongAndOverflow(ignore_index.ptr(), &overflow);
  constexpr double least = std::numeric_limits<double>::min(), any = -INF<double>;
  o.softcap = plan.normalizer = 0;
  if (overflow || !read_number(label_smoothing, 0, o.label_smoothing) || o.label_smoothing > 1 ||
      !read_number(z_loss, 0, o.z_loss) || !read_number(logit_scale, any, o.logit_scale) ||
      (!softcap.is_none() && !read_number(softcap, least, o.softcap)) ||
      (!normalizer.is_none() && !read_number(normalizer, least, plan.normalizer)) ||
      !PyUnicode_CheckExact(reduction.ptr())) {
    return {};
  }
  const auto is = [&](const char* name) {
    return PyUnicode_CompareWithASCIIString(reduction.ptr(), name) == 0;
  };
  if (!is("mean") && (!normalizer.is_none() || !(is("sum") || is("none")))) return {};
  plan.reduction = is("mean") ? Reduction::mean : is("sum") ? Reduction::sum : Reduction::none;

  const auto is_half = [](c10::ScalarType t) { return t == c10::kBFloat16 || t == c10::kHalf; };
  const auto is_float = [&](c10::ScalarType t) {
    return t == c10::kFloat || t == c10::kDouble || is_half(t);
  };
  // The type that the logits count as: autocast widens the half types.
  const bool widened = is_half(x.scalar_type()) && at::autocast::is_autocast_enabled(x.device().type());
  const auto type = widened ? c10::kFloat : x.scalar_type();
  if (!dtype.is_none() && !THPDtype_Check(dtype.ptr())) return {};
  plan.result_dtype =
      dtype.is_none() ? type : reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  plan.dtype = plan.result_dtype == c10::kDouble ? c10::kDouble : c10::kFloat;
  const bool readable = x.scalar_type() == plan.dtype ||
      (plan.dtype == c10::kFloat && is_half(x.scalar_type()));
  if (!is_float(plan.result_dtype) || !readable || x.dim() == 0 || x.numel() == 0) return {};

  plan.dim = x.dim() > 1 ? 1 : 0;
  if (target.sizes() == x.sizes()) {
    if (target.scalar_type() != type || o.ignore_index >= 0) return {};
  } else if (target.scalar_type() != c10::kLong ||
             target.sizes() != c10::IntArrayRef(row_sizes(x, plan.dim))) {
    return {};
  }
  if (weight &&
      (weight->dim() != 1 || weight->numel() != x.size(plan.dim) ||
       (weight->scalar_type() != type &&
        (dtype.is_none() || weight->scalar_type() != plan.result_dtype)))) {
    return {};
  }
  const bool own_memory = x.is_contiguous() && !x.is_view();
  if (!PyBool_Check(inplace.ptr())) return {};
  plan.inplace = inplace.ptr() == Py_True;
  if (plan.inplace && (!own_memory || (differentiable(x) && x.is_leaf()))) return {};
  return plan;
}

// The loss, or None where Python is to look at the arguments and the Function is to answer.
inline py::object cross_entropy_node(py::handle input, py::handle target, py::handle weight,
                                     py::handle ignore_index, py::handle reduction,
                                     py::handle label_smoothing, py::handle z_loss,
                                     py::handle softcap, py::handle logit_scale,
                                     py::handle normalizer, py::handle dtype,
                                     py::handle inplace) {
  if (!plain(input) || !plain(target) || !(weight.is_none() || plain(weight)) ||
      !surroundings_plain()) {
    return py::none();
  }
  const Tensor x = THPVariable_Unpack(input.ptr()), t = THPVariable_Unpack(target.ptr());
  std::optional<Tensor> w;
  if (!weight.is_none()) w = THPVariable_Unpack(weight.ptr());
  if (differentiable(t) || (w && differentiable(*w))) return py::none();
  if (t.device() != x.device() || (w && w->device() != x.device())) return py::none();
  const Launcher* there = launcher_for(x);
  if (there && x.numel() > there->most_rows * (x.dim() > 1 ? x.size(1) : x.numel())) {
    return py::none();
  }
  const auto plan = plan_of(x, t, w, ignore_index, reduction, label_smoothing, z_loss, softcap,
                            logit_scale, normalizer, dtype, inplace);
  if (!plan) return py::none();
  if (w) w = w->to(plan->dtype);
  Tensor loss;
  {
    py::gil_scoped_release no_gil;
    loss = CrossEntropy::apply(x, t, w, &*plan);
  }
  return py::cast(loss);
}

}  // namespace custom_ops
