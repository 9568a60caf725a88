// Checks of the registered operators, made before anything is read. A saved graph may be run with
// other tensors than it was traced with.
#pragma once

#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

namespace custom_ops {

using at::Tensor;

inline std::vector<int64_t> row_sizes(const Tensor& input, int64_t dim) {
  auto sizes = input.sizes().vec();
  if (!sizes.empty()) sizes.erase(sizes.begin() + at::maybe_wrap_dim(dim, input.dim()));
  return sizes;
}

inline void check_type(const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      type == c10::kFloat || type == c10::kDouble || type == c10::kBFloat16 || type == c10::kHalf,
      name, " must be of a floating-point type (float64, float32, bfloat16 or float16), got ",
      type);
}

inline void check_like(const char* name, const Tensor& t, c10::IntArrayRef sizes,
                       c10::ScalarType type) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
}

inline void check_pair(const Tensor& p, const Tensor& v, int64_t dim) {
  check_type("p", p);
  at::maybe_wrap_dim(dim, p.dim());
  check_like("v", v, p.sizes(), p.scalar_type());
}

// `acc` is the type of the statistics: float64 for itself, float32 for all others.
inline void check_problem(const Tensor& input, const Tensor& target,
                          const std::optional<Tensor>& weight, int64_t dim, c10::ScalarType acc) {
  check_type("input", input);
  TORCH_CHECK_VALUE(input.dim() > 0, "input must have a dimension of classes, got a 0-d tensor");
  const bool wide = input.scalar_type() == c10::kDouble;
  TORCH_CHECK_TYPE(acc == (wide ? c10::kDouble : c10::kFloat), "statistics of ",
                   input.scalar_type(), " must be ", wide ? c10::kDouble : c10::kFloat, ", got ",
                   acc);
  const int64_t classes = input.size(dim);
  if (target.is_floating_point()) {
    check_type("target", target);
    check_like("target", target, input.sizes(), target.scalar_type());
    TORCH_CHECK_TYPE(target.scalar_type() != c10::kDouble || wide, "target must not be wider than ",
                     "input, got ", target.scalar_type(), " beside ", input.scalar_type());
    TORCH_CHECK_TYPE(target.scalar_type() == c10::kDouble || !wide, "target must be ",
                     c10::kDouble, " beside such an input, got ", target.scalar_type());
  } else {
    check_like("target", target, row_sizes(input, dim), c10::kLong);
  }
  if (weight) check_like("weight", *weight, classes, acc);
}

inline void check_rows(const char* name, const Tensor& t, const Tensor& input, int64_t dim,
                       c10::ScalarType acc) {
  check_like(name, t, row_sizes(input, dim), acc);
}

// g may also be one number for all rows.
inline void check_upstream(const Tensor& input, int64_t dim, const Tensor& g,
                           const std::optional<Tensor>& q, const Tensor& M, const Tensor& L) {
  const auto acc = M.scalar_type();
  if (g.dim() == 0) {
    check_like("g", g, {}, acc);
  } else {
    check_rows("g", g, input, dim, acc);
  }
  if (q) check_rows("q", *q, input, dim, acc);
  check_rows("M", M, input, dim, acc);
  check_rows("L", L, input, dim, acc);
}

}  // namespace custom_ops
