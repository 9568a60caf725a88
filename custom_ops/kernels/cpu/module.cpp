// The operators as torch sees them: custom_ops::… for the CPU.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

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
  m.impl("softmax", softmax);
  m.impl("contract", mapped<Map::contract>);
  m.impl("log_softmax_vjp", mapped<Map::log_softmax_vjp>);
  m.impl("log_softmax_jvp", mapped<Map::log_softmax_jvp>);
  m.impl("total", [](const Tensor& input) { return total(input); });
  m.impl("cross_entropy", [](const Tensor& input, const Tensor& target, Weight weight, int64_t dim,
                             c10::ScalarType dtype, int64_t ignore_index, double label_smoothing,
                             double z_loss, double logit_scale, std::optional<double> softcap,
                             bool predict) {
    const Options o = options(ignore_index, label_smoothing, z_loss, logit_scale, softcap);
    return cross_entropy(input, target, weight, dim, dtype, predict, o);
  });
  m.impl("cross_entropy_vjp",
         [](const Tensor& input, const Tensor& target, Weight weight, const Tensor& g, Weight h,
            const Tensor& M, const Tensor& L, int64_t dim, int64_t ignore_index,
            double label_smoothing, double z_loss, double logit_scale,
            std::optional<double> softcap) {
           const Options o = options(ignore_index, label_smoothing, z_loss, logit_scale, softcap);
           return cross_entropy_vjp(input, target, weight, g, h, M, L, dim, false, o);
         });
  m.impl("cross_entropy_vjp_",
         [](const Tensor& input, const Tensor& target, Weight weight, const Tensor& g, Weight h,
            const Tensor& M, const Tensor& L, int64_t dim, int64_t ignore_index,
            double label_smoothing, double z_loss, double logit_scale,
            std::optional<double> softcap) {
           const Options o = options(ignore_index, label_smoothing, z_loss, logit_scale, softcap);
           cross_entropy_vjp(input, target, weight, g, h, M, L, dim, true, o);
         });
  m.impl("cross_entropy_hvp_",
         [](const Tensor& z, const Tensor& target, Weight weight, const Tensor& u, const Tensor& g,
            Weight h, const Tensor& M, const Tensor& L, int64_t ignore_index,
            double label_smoothing, double z_loss) {
           const Options o = options(ignore_index, label_smoothing, z_loss, 1, std::nullopt);
           return cross_entropy_hvp(z, target, weight, u, g, h, M, L, o);
         });
}

}  // namespace custom_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace custom_ops;
  m.attr("torch_version") = TORCH_VERSION;
  m.def("softmax", softmax_node<false>);
  m.def("log_softmax", softmax_node<true>);
  m.def("cross_entropy", cross_entropy_node);
  m.def("advise_huge_pages", advise_huge_pages);
  m.attr("has_bf16_products") = has_bf16_products();
  m.def("add_product", add_product, py::call_guard<py::gil_scoped_release>());
  m.def("set_vjp", [](const std::string& name, py::object vjp) { vjps()[name] = std::move(vjp); });
  m.def("set_launcher", [](const std::string& device, int64_t most_rows, py::object forward,
                             py::object backward) {
    launchers()[c10::Device(device).type()] = {most_rows, std::move(forward), std::move(backward)};
  });
}
