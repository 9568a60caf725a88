// What a node takes. It declines everything else, and then the Python Functions are applied.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>

#include "../kernels/cpu/operators.h"

namespace custom_ops {

namespace py = pybind11;

// The Python functions of `launcher.py`, which launch on another device.
struct Launcher {
  std::map<std::string, py::object> functions;
};

inline std::map<c10::DeviceType, Launcher>& launchers() {
  static auto* kept = new std::map<c10::DeviceType, Launcher>;
  return *kept;
}

inline const Launcher* launcher_for(const Tensor& t) {
  const auto found = launchers().find(t.device().type());
  return found == launchers().end() ? nullptr : &found->second;
}

// Whether t is a dense strided tensor, seen by autograd's reverse mode at most.
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

// Whether no mode, transform or tracer is active in this thread. Autocast may be on.
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

// Whether the kernels can compute this backward: it is neither differentiated itself nor batched.
inline bool plain_backward(const Tensor& g) {
  return !torch::autograd::GradMode::is_enabled() && plain(g) && surroundings_plain();
}

// The Python functions for a backward that is differentiated or batched.
inline std::map<std::string, py::object>& vjps() {
  // never destroyed: Python may be gone by then
  static auto* kept = new std::map<std::string, py::object>;
  return *kept;
}

template <typename... Args>
Tensor python_vjp(const char* name, const Args&... args) {
  py::gil_scoped_acquire gil;
  return vjps().at(name)(args...).template cast<Tensor>();
}

}  // namespace custom_ops
