// The operators of kernels/operators.py for the CPU, and the same functions for Python to
// call directly where nothing watches the operators.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "check.h"
#include "../../node/cross_entropy.h"
#include "../../node/softmax.h"
#include "operators.h"
#include "products.h"

namespace custom_ops {
namespace {

using Optional = const std::optional<Tensor>&;
using Numbers = at::ArrayRef<double>;

// `Options.flat` of kernels/problem.py, put together.
Options options(int64_t dim, c10::ScalarType dtype, int64_t ignore_index, Numbers numbers) {
  TORCH_CHECK_VALUE(numbers.size() == 4,
                    "numbers must be label_smoothing, z_loss, logit_scale and ", "softcap, got ",
                    numbers);
  return {dim, dtype, ignore_index, numbers[0], numbers[1], numbers[2], numbers[3]};
}

Tensor softmax_op(const Tensor& input, int64_t dim, bool log) {
  check_type("input", input);
  return softmax(input, dim, log);
}

template <Map map>
Tensor map_op(const Tensor& p, const Tensor& v, int64_t dim) {
  check_pair(p, v, dim);
  return mapped<map>(p, v, dim);
}

Tensor total_op(const Tensor& input) {
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(type == c10::kFloat || type == c10::kDouble, "input must be ", c10::kFloat,
                   " or ", c10::kDouble, ", got ", type);
  return total(input);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_op(
    const Tensor& input, const Tensor& target, Optional weight, int64_t dim, c10::ScalarType dtype,
    int64_t ignore_index, Numbers numbers, bool stats) {
  check_problem(input, target, weight, dim, dtype);
  Options o = options(dim, dtype, ignore_index, numbers);
  o.stats = stats;
  const Found found = cross_entropy(input, target, weight, o);
  return {found.loss, found.M, found.L, found.prediction, found.entropy};
}

template <bool inplace>
Tensor vjp_op(const Tensor& input, const Tensor& target, Optional weight, const Tensor& g,
              Optional q, const Tensor& M, const Tensor& L, int64_t dim, c10::ScalarType dtype,
              int64_t ignore_index, Numbers numbers) {
  check_problem(input, target, weight, dim, dtype);
  check_upstream(input, dim, g, q, M, L);
  Options o = options(dim, dtype, ignore_index, numbers);
  o.inplace = inplace;
  return cross_entropy_vjp(input, target, weight, Rows(g, q, M, L), o);
}

void vjp_inplace_op(const Tensor& input, const Tensor& target, Optional weight, const Tensor& g,
                    Optional q, const Tensor& M, const Tensor& L, int64_t dim,
                    c10::ScalarType dtype, int64_t ignore_index, Numbers numbers) {
  vjp_op<true>(input, target, weight, g, q, M, L, dim, dtype, ignore_index, numbers);
}

void vjp_out_op(const Tensor& input, const Tensor& target, Optional weight, const Tensor& g,
                Optional q, const Tensor& M, const Tensor& L, int64_t dim, c10::ScalarType dtype,
                int64_t ignore_index, Numbers numbers, const Tensor& out) {
  check_problem(input, target, weight, dim, dtype);
  check_upstream(input, dim, g, q, M, L);
  check_like("out", out, input.sizes(), input.scalar_type());
  const Options o = options(dim, dtype, ignore_index, numbers);
  cross_entropy_vjp_out(input, target, weight, Rows(g, q, M, L), o, out);
}

std::tuple<Tensor, Tensor> hvp_op(const Tensor& z, const Tensor& target, Optional weight,
                                  const Tensor& u, const Tensor& g, Optional q, const Tensor& M,
                                  const Tensor& L, int64_t dim, c10::ScalarType dtype,
                                  int64_t ignore_index, Numbers numbers) {
  TORCH_CHECK_VALUE(z.dim() == 2 && dim == 1, "z must be (N, C) with dim 1, got shape ", z.sizes(),
                    " and dim ", dim);
  check_problem(z, target, weight, 1, dtype);
  check_like("u", u, z.sizes(), z.scalar_type());
  check_upstream(z, 1, g, q, M, L);
  const Options o = options(1, dtype, ignore_index, numbers);
  TORCH_CHECK_VALUE(o.logit_scale == 1 && o.softcap == 0, "z must be without scale and cap");
  return cross_entropy_hvp(z, target, weight, u, Rows(g, q, M, L), o);
}

// An operator as Python calls it directly, with a list for its numbers.
template <typename Result, typename... Args>
auto direct_of(Result (*op)(Args...)) {
  return
      [op](std::conditional_t<std::is_same_v<Args, Numbers>, std::vector<double>, Args>... args) {
        return op(args...);
      };
}

}  // namespace

TORCH_LIBRARY_IMPL(custom_ops, CPU, m) {
  m.impl("softmax", softmax_op);
  m.impl("contract", map_op<Map::contract>);
  m.impl("log_softmax_vjp", map_op<Map::log_softmax_vjp>);
  m.impl("log_softmax_jvp", map_op<Map::log_softmax_jvp>);
  m.impl("total", total_op);
  m.impl("cross_entropy", cross_entropy_op);
  m.impl("cross_entropy_vjp", vjp_op<false>);
  m.impl("cross_entropy_vjp_", vjp_inplace_op);
  m.impl("cross_entropy_hvp_", hvp_op);
}

}  // namespace custom_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace custom_ops;
  m.attr("torch_version") = TORCH_VERSION;

  const py::call_guard<py::gil_scoped_release> no_gil;
  auto direct = m.def_submodule("direct", "The operators without torch's dispatcher.");
  direct.def("softmax", softmax_op, no_gil);
  direct.def("contract", map_op<Map::contract>, no_gil);
  direct.def("log_softmax_vjp", map_op<Map::log_softmax_vjp>, no_gil);
  direct.def("log_softmax_jvp", map_op<Map::log_softmax_jvp>, no_gil);
  direct.def("total", total_op, no_gil);
  direct.def("cross_entropy", direct_of(cross_entropy_op), no_gil);
  direct.def("cross_entropy_vjp", direct_of(vjp_op<false>), no_gil);
  direct.def("cross_entropy_vjp_", direct_of(vjp_inplace_op), no_gil);
  direct.def("cross_entropy_vjp_out", direct_of(vjp_out_op), no_gil);
  direct.def("cross_entropy_hvp_", direct_of(hvp_op), no_gil);

  m.def("softmax", softmax_node<false>);
  m.def("log_softmax", softmax_node<true>);
  m.def("cross_entropy", cross_entropy_node);
  m.def("advise_huge_pages", advise_huge_pages);
  m.attr("has_bf16_products") = has_bf16_products();
  m.def("add_product", add_product, no_gil);
  m.def("add_product_by_vectors", add_product_by_vectors, no_gil);
  m.def("set_vjp", [](const std::string& name, py::object vjp) { vjps()[name] = std::move(vjp); });
  m.def("set_launcher", [](const std::string& device, std::map<std::string, py::object> functions) {
    launchers()[c10::Device(device).type()] = {std::move(functions)};
  });
  bind_launches(m);
}
