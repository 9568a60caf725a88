// Softmax and log-softmax as autograd nodes.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "launches.h"

namespace custom_ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <bool log>
struct Softmax : torch::autograd::Function<Softmax<log>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, int64_t dim) {
    const Launcher* there = launcher_for(input);
    const Key key(log ? Launched::log_softmax : Launched::softmax);
    Tensor y = there ? launched(*there, "softmax", Key(key).add(dim), {input}, dim, log)[0]
                     : softmax(input, dim, log);
    ctx->save_for_backward({y});
    ctx->saved_data["dim"] = dim;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Tensor &v = gradients[0], y = ctx->get_saved_variables()[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (!v.defined()) return {Tensor(), Tensor()};
    const Launcher* there = launcher_for(y);
    if (there && plain_backward(v)) {
      const char* name = log ? "log_softmax_vjp" : "contract";
      const Key key(log ? Launched::log_softmax_vjp : Launched::contract);
      return {launched(*there, name, Key(key).add(dim), {y, v}, dim)[0], Tensor()};
    }
    if (plain_backward(v)) {
      return {log ? mapped<Map::log_softmax_vjp>(y, v, dim) : mapped<Map::contract>(y, v, dim),
              Tensor()};
    }
    return {python_vjp(log ? "log_softmax" : "softmax", y, v, dim), Tensor()};
  }
};

// The result, or None to decline.
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

}  // namespace custom_ops
