// The operators as torch sees them: custom_ops::… for the CPU, and the same functions for Python to
// call directly where nothing watches the operators.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "check.h"
#include "nodes.h"
#include "operators.h"
#include "products.h"

namespace custom_ops {
namespace {

using Weight = const std::optional<Tensor>&;

Options options(int64_t ignore_index, double label_smoothing, double z_loss, double logit_scale,
                std::optional<double> softcap) {
  return {ignore_index, label_smoothing, z_loss, logit_scale, softcap.value_or(0)};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_op(
    const Tensor& input, const Tensor& target, Weight weight, int64_t dim, c10::ScalarType dtype,
    int64_t ignore_index, double label_smoothing, double z_loss, double logit_scale,
    std::optional<double> softcap, bool predict) {
  check_problem(input, target, weight, dim, dtype);
  const Options o = options(ignore_index, label_smoothing, z_loss, logit_scale, softcap);
  return cross_entropy(input, target, weight, dim, dtype, predict, o);
}

template <bool inplace>
Tensor vjp_op(const Tensor& input, const Tensor& target, Weight weight, const Tensor& g, Weight h,
              const Tensor& M, const Tensor& L, int64_t dim, int64_t ignore_index,
              double label_smoothing, double z_loss, double logit_scale,
              std::optional<double> softcap) {
  check_problem(input, target, weight, dim, M.scalar_type());
  check_upstream(input, dim, g, h, M, L);
  const Options o = options(ignore_index, label_smoothing, z_loss, logit_scale, softcap);
  return cross_entropy_vjp(input, target, weight, g, h, M, L, dim, inplace, o);
}

void vjp_inplace_op(const Tensor& input, const Tensor& target, Weight weight, const Tensor& g,
                    Weight h, const Tensor& M, const Tensor& L, int64_t dim, int64_t ignore_index,
                    double label_smoothing, double z_loss, double logit_scale,
                    std::optional<double> softcap) {
  vjp_op<true>(input, target, weight, g, h, M, L, dim, ignore_index, label_smoothing, z_loss,
               logit_scale, softcap);
}

std::tuple<Tensor, Tensor> hvp_op(const Tensor& z, const Tensor& target, Weight weight,
                                  const Tensor& u, const Tensor& g, Weight h, const Tensor& M,
                                  const Tensor& L, int64_t ignore_index, double label_smoothing,
                                  double z_loss) {
  TORCH_CHECK_VALUE(z.dim() == 2, "z must be (N, C), got shape ", z.sizes());
  check_problem(z, target, weight, 1, M.scalar_type());
  check_like("u", u, z.sizes(), z.scalar_type());
  check_upstream(z, 1, g, h, M, L);
  const Options o = options(ignore_index, label_smoothing, z_loss, 1, std::nullopt);
  return cross_entropy_hvp(z, target, weight, u, g, h, M, L, o);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(custom_ops, m) {
  m.def("softmax(Tensor input, int dim, bool log) -> Tensor");
  m.def("contract(Tensor p, Tensor v, int dim) -> Tensor");
  m.def("log_softmax_vjp(Tensor y, Tensor v, int dim) -> Tensor");
  m.def("log_softmax_jvp(Tensor y, Tensor v, int dim) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int dim, ScalarType dtype, "
      "int ignore_index, float label_smoothing, float z_loss, float logit_scale, float? softcap, "
      "bool predict) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_vjp(Tensor input, Tensor target, Tensor? weight, Tensor g, Tensor? h, "
      "Tensor M, Tensor L, int dim, int ignore_index, float label_smoothing, float z_loss, "
      "float logit_scale, float? softcap) -> Tensor");
  m.def(
      "cross_entropy_vjp_(Tensor(a!) input, Tensor target, Tensor? weight, Tensor g, Tensor? h, "
      "Tensor M, Tensor L, int dim, int ignore_index, float label_smoothing, float z_loss, "
      "float logit_scale, float? softcap) -> ()");
  m.def(
      "cross_entropy_hvp_(Tensor(a!) z, Tensor target, Tensor? weight, Tensor(b!) u, Tensor g, "
      "Tensor? h, Tensor M, Tensor L, int ignore_index, float label_smoothing, float z_loss) -> "
      "(Tensor, Tensor)");
  m.def("total(Tensor input) -> Tensor");
}

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
  direct.def("cross_entropy", cross_entropy_op, no_gil);
  direct.def("cross_entropy_vjp", vjp_op<false>, no_gil);
  direct.def("cross_entropy_vjp_", vjp_inplace_op, no_gil);
  direct.def("cross_entropy_hvp_", hvp_op, no_gil);

  m.def("softmax", softmax_node<false>);
  m.def("log_softmax", softmax_node<true>);
  m.def("cross_entropy", cross_entropy_node);
  m.def("advise_huge_pages", advise_huge_pages);
  m.attr("has_bf16_products") = has_bf16_products();
  m.def("add_product", add_product, no_gil);
  m.def("set_vjp", [](const std::string& name, py::object vjp) { vjps()[name] = std::move(vjp); });
  m.def("set_launcher", [](const std::string& device, int64_t most_rows, py::object forward,
                             py::object backward) {
    launchers()[c10::Device(device).type()] = {most_rows, std::move(forward), std::move(backward)};
  });
}
