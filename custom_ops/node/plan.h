// A cross-entropy without its tensors, and how it is read from the arguments of the call.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <vector>

#include "launches.h"

namespace custom_ops {

using torch::autograd::AutogradContext;

enum class Reduction { none, sum, mean };
constexpr const char* REDUCTIONS[] = {"none", "sum", "mean"};

struct Plan {
  Options o;
  c10::ScalarType result_dtype;
  Reduction reduction;
  double normalizer;  // 0 for none

  std::vector<double> numbers() const {
    return {o.label_smoothing, o.z_loss, o.logit_scale, o.softcap};
  }

  // What a recorded launch depends on.
  Key key(int64_t name) const {
    Key key(name);
    for (const int64_t i : integers()) key.add(i);
    for (const double x : numbers()) key.add(x);
    return key.add(normalizer);
  }

  std::vector<int64_t> integers() const {
    return {o.dim,     int64_t(o.dtype),      o.ignore_index,     o.stats,
            o.inplace, int64_t(result_dtype), int64_t(reduction)};
  }

  // Kept by autograd as plain numbers, which compiled autograd can hash.
  void save(AutogradContext* ctx) const {
    ctx->saved_data["integers"] = integers();
    ctx->saved_data["numbers"] = numbers();
    ctx->saved_data["normalizer"] = normalizer;
  }

  static Plan saved(AutogradContext* ctx) {
    const auto i = ctx->saved_data["integers"].toIntVector();
    const auto x = ctx->saved_data["numbers"].toDoubleVector();
    const Options o{i[0], c10::ScalarType(i[1]), i[2], x[0], x[1], x[2], x[3], i[3] != 0, i[4] != 0};
    return {o, c10::ScalarType(i[5]), Reduction(i[6]), ctx->saved_data["normalizer"].toDouble()};
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

// The arguments that follow the tensors, as Python passes them.
struct Given {
  py::handle ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, normalizer,
      dtype, inplace, stats;

  explicit Given(const py::args& a)
      : ignore_index(a[0]), reduction(a[1]), label_smoothing(a[2]), z_loss(a[3]), softcap(a[4]),
        logit_scale(a[5]), normalizer(a[6]), dtype(a[7]), inplace(a[8]), stats(a[9]) {}
};

// Reads the numbers and the reduction. False if one is not of Python's own type, or is out of
// range.
inline bool read_options(const Given& given, Plan& plan) {
  Options& o = plan.o;
  int overflow = 0;
  if (!PyLong_CheckExact(given.ignore_index.ptr())) return false;
  o.ignore_index = PyLong_AsLongLongAndOverflow(given.ignore_index.ptr(), &overflow);
  constexpr double least = std::numeric_limits<double>::min(), any = -INF<double>;
  o.softcap = plan.normalizer = 0;
  if (overflow || !read_number(given.label_smoothing, 0, o.label_smoothing) ||
      o.label_smoothing > 1 || !read_number(given.z_loss, 0, o.z_loss) ||
      !read_number(given.logit_scale, any, o.logit_scale) ||
      (!given.softcap.is_none() && !read_number(given.softcap, least, o.softcap)) ||
      (!given.normalizer.is_none() && !read_number(given.normalizer, least, plan.normalizer)) ||
      !PyUnicode_CheckExact(given.reduction.ptr())) {
    return false;
  }
  const auto is = [&](const char* name) {
    return PyUnicode_CompareWithASCIIString(given.reduction.ptr(), name) == 0;
  };
  if (!is("mean") && (!given.normalizer.is_none() || !(is("sum") || is("none")))) return false;
  plan.reduction = is("mean") ? Reduction::mean : is("sum") ? Reduction::sum : Reduction::none;
  return true;
}

inline bool is_half_type(c10::ScalarType t) { return t == c10::kBFloat16 || t == c10::kHalf; }

// Of the integer types, those that int64 holds.
inline bool is_label(c10::ScalarType t) {
  return c10::isIntegralType(t, false) && !c10::isBarebonesUnsignedType(t);
}

// Reads the dtypes. `type` is that of the logits after autocast.
inline bool read_dtypes(const Given& given, const Tensor& x, c10::ScalarType type, Plan& plan) {
  if (!given.dtype.is_none() && !THPDtype_Check(given.dtype.ptr())) return false;
  const auto result = plan.result_dtype =
      given.dtype.is_none() ? type : reinterpret_cast<THPDtype*>(given.dtype.ptr())->scalar_type;
  const auto dtype = plan.o.dtype = result == c10::kDouble ? c10::kDouble : c10::kFloat;
  const auto of_x = x.scalar_type();
  const bool is_read = of_x == dtype || (dtype == c10::kFloat && is_half_type(of_x));
  return is_read && (result == c10::kFloat || result == c10::kDouble || is_half_type(result));
}

// Whether target and class weights are of the shapes and types that the kernels read.
inline bool fit(const Tensor& x, const Tensor& target, const std::optional<Tensor>& weight,
                c10::ScalarType type, const Plan& plan) {
  if (target.sizes() == x.sizes()) {
    if (target.scalar_type() != type || plan.o.ignore_index >= 0) return false;
  } else if (!is_label(target.scalar_type()) ||
             target.sizes() != c10::IntArrayRef(row_sizes(x, plan.o.dim))) {
    return false;
  }
  return !weight ||
      (weight->dim() == 1 && weight->numel() == x.size(plan.o.dim) &&
       (weight->scalar_type() == type || weight->scalar_type() == plan.result_dtype));
}

// The plan, or none if an argument is wrong or rare: then Python's checks decide.
inline std::optional<Plan> plan_of(const Tensor& x, const Tensor& target,
                                   const std::optional<Tensor>& weight, const Given& given) {
  Plan plan;
  // Autocast widens the half types.
  const bool widened =
      is_half_type(x.scalar_type()) && at::autocast::is_autocast_enabled(x.device().type());
  const auto type = widened ? c10::kFloat : x.scalar_type();
  if (!read_options(given, plan) || !read_dtypes(given, x, type, plan)) return {};
  if (x.dim() == 0 || x.numel() == 0) return {};
  plan.o.dim = x.dim() > 1 ? 1 : 0;
  if (!fit(x, target, weight, type, plan)) return {};
  if (!PyBool_Check(given.inplace.ptr()) || !PyBool_Check(given.stats.ptr())) return {};
  plan.o.stats = given.stats.ptr() == Py_True;
  plan.o.inplace = given.inplace.ptr() == Py_True;
  const bool own_memory = x.is_contiguous() && !x.is_view();
  if (plan.o.inplace && (!own_memory || (differentiable(x) && x.is_leaf()))) return {};
  return plan;
}

}  // namespace custom_ops
