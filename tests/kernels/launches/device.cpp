// Two CUDA devices that are not there: tensors in host memory, a current device and current streams
// of each thread; and what torch asks of a device to allocate and to view. Its engine for backwards
// wants more, so that a node is called as the engine would.
#include <ATen/ATen.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex current = 0;
thread_local c10::StreamId streams[DEVICES] = {};

void* handle_of(Stream stream) {
  return reinterpret_cast<void*>(0x1000 * (1 + stream.device_index()) + stream.id());
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device d) const override {
    const Device before = getDevice();
    current = d.index();
    return before;
  }
  Device getDevice() const override { return Device(c10::kCUDA, current); }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Stream getStream(Device d) const override {
    const DeviceIndex index = d.has_index() ? d.index() : current;
    return Stream(Stream::UNSAFE, Device(c10::kCUDA, index), streams[index]);
  }
  Stream exchangeStream(Stream s) const override {
    const Stream before = getStream(s.device());
    streams[s.device_index()] = s.id();
    return before;
  }
  void* getStreamNativeHandle(const Stream s) const override { return handle_of(s); }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};

at::Tensor on(const at::Tensor& host, Device device) {
  const auto options = host.options().device(device);
  return at::for_blob(host.data_ptr(), host.sizes())
      .strides(host.strides())
      .context(new at::Tensor(host), [](void* kept) { delete static_cast<at::Tensor*>(kept); })
      .options(options)
      .target_device(device)
      .make_tensor();
}

Device of(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(c10::kCUDA, current);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                         std::optional<Device> device, std::optional<bool>) {
  return on(at::empty_strided(sizes, strides, at::dtype(type.value_or(c10::kFloat))), of(device));
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> type,
                 std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>,
                 std::optional<c10::MemoryFormat>) {
  return on(at::empty(sizes, at::dtype(type.value_or(c10::kFloat))), of(device));
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty_strided", empty_strided);
  m.impl("empty.memory_format", empty);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("on", [](const at::Tensor& host, int index) {
    return on(host, Device(c10::kCUDA, static_cast<DeviceIndex>(index)));
  });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) { current = static_cast<DeviceIndex>(index); });
  m.def("set_stream", [](int device, int stream) { streams[device] = stream; });
  m.def("stream", [](int device) {
    const Device d(c10::kCUDA, static_cast<DeviceIndex>(device));
    return reinterpret_cast<uintptr_t>(handle_of(Guard().getStream(d)));
  });
}
