// The operators as torch sees them: custom_ops::… for the CPU.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "operators.h"

namespace custom_ops {
namespace {

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
}

TORCH_LIBRARY_IMPL(custom_ops, CPU, m) {
  m.impl("softmax", softmax);
  m.impl("contract", mapped<Map::contract>);
  m.impl("log_softmax_vjp", mapped<Map::log_softmax_vjp>);
  m.impl("log_softmax_jvp", mapped<Map::log_softmax_jvp>);
  m.impl("cross_entropy",
         [](const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
            int64_t dim, c10::ScalarType dtype, int64_t ignore_index, double label_smoothing,
            double z_loss, double logit_scale, std::optional<double> softcap, bool predict) {
           return cross_entropy(input, target, weight, dim, dtype, predict,
                                options(ignore_index, label_smoothing, z_loss, logit_scale, softcap));
         });
  m.impl("cross_entropy_vjp",
         [](const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
            const Tensor& g, const std::optional<Tensor>& h, const Tensor& M, const Tensor& L,
            int64_t dim, int64_t ignore_index, double label_smoothing, double z_loss,
            double logit_scale, std::optional<double> softcap) {
           return cross_entropy_vjp(input, target, weight, g, h, M, L, dim, false,
                                    options(ignore_index, label_smoothing, z_loss, logit_scale,
                                            softcap));
         });
}

}  // namespace custom_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("torch_version") = TORCH_VERSION;
}
