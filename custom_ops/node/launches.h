// Launches of Triton's compiled kernels, made again as they were recorded, without Python.
//
// The first call of a kind is Python's (`launcher.py`). It launches by Triton, and hands over what it
// launched: the kernels' handles, their parameters, and which memory it allocated. A later call of
// the same kind differs in where its tensors lie and in nothing else. Its kind is its key: of every
// tensor the type, sizes, strides and whether it begins at a multiple of 16, which Triton compiles
// for; and the numbers. Hooks in Triton's launcher, a profiler's, see the first call alone.
#pragma once

#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/hash.h>
#include <dlfcn.h>
#include <torch/csrc/Dtype.h>

#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "plain.h"

namespace custom_ops {

// What a launch needs of CUDA's driver. Its library is there wherever a device is, so no header and
// no library of CUDA's is needed to build.
struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** parameters, void** extra);
  int (*context)(void**);
  int (*set_context)(void*);
  int (*retain_context)(void**, int device);
  int (*message)(int error, const char**);

  // The driver, or nullptr where there is none.
  static const Driver* get() {
    static const std::optional<Driver> found = load();
    return found ? &*found : nullptr;
  }

  void check(int error) const {
    const char* said = nullptr;
    if (error) message(error, &said);
    TORCH_CHECK(!error, "CUDA error in a launch: ", said ? said : "unknown");
  }

  // A thread that nothing of CUDA's was called in has no context yet.
  void need_context(c10::Device device) const {
    void* current = nullptr;
    check(context(&current));
    if (current) return;
    check(retain_context(&current, device.has_index() ? device.index() : 0));
    check(set_context(current));
  }

 private:
  static std::optional<Driver> load() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    Driver driver;
    const auto find = [&](auto& function, const char* name) {
      using Function = std::remove_reference_t<decltype(function)>;
      function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
      return function != nullptr;
    };
    const bool whole = find(driver.launch, "cuLaunchKernel") &&
        find(driver.context, "cuCtxGetCurrent") && find(driver.set_context, "cuCtxSetCurrent") &&
        find(driver.retain_context, "cuDevicePrimaryCtxRetain") &&
        find(driver.message, "cuGetErrorString");
    return whole ? std::optional(driver) : std::nullopt;
  }
};

// The current stream; a CPU, on whose tensors the tests launch, has none.
inline void* current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// What is launched for a kind of call. Memory is named by its place among the call's tensors, and
// behind them what is allocated anew.
struct Recording {
  struct Memory {
    c10::ScalarType dtype;
    std::vector<int64_t> sizes, strides;
  };
  struct Parameter {
    int64_t memory;  // whose address it is, or -1
    std::array<char, 8> bytes;
  };
  struct Launch {
    void* function;
    unsigned programs, threads, shared;
    std::vector<Parameter> parameters;
  };

  std::vector<Memory> allocated;
  std::vector<Launch> launches;
  std::vector<int64_t> results;  // -1 for none
  const volatile int64_t* watched;  // where a device says that a label was bad, or nullptr

  // The results, or nothing where Python is to have a look.
  std::optional<std::vector<Tensor>> play(const std::vector<Tensor>& given) const {
    const Driver* driver = Driver::get();
    if (!driver || (watched && *watched)) return {};
    const auto device = given[0].device();
    const c10::DeviceGuard guard(device);
    std::vector<Tensor> memory = given;
    for (const Memory& m : allocated) {
      memory.push_back(at::empty_strided(m.sizes, m.strides, given[0].options().dtype(m.dtype)));
      if (reinterpret_cast<uintptr_t>(memory.back().data_ptr()) % 16) return {};
    }
    driver->need_context(device);
    void* stream = current_stream(device);
    for (const Launch& l : launches) launch(*driver, l, memory, stream);
    std::vector<Tensor> found;
    for (const int64_t at : results) found.push_back(at < 0 ? Tensor() : memory[at]);
    return found;
  }

 private:
  static void launch(const Driver& driver, const Launch& l, const std::vector<Tensor>& memory,
                     void* stream) {
    c10::SmallVector<void*, 48> addresses(l.parameters.size()), parameters;
    for (size_t i = 0; i < l.parameters.size(); ++i) {
      const Parameter& p = l.parameters[i];
      if (p.memory >= 0) addresses[i] = memory[p.memory].data_ptr();
      parameters.push_back(p.memory >= 0 ? static_cast<void*>(&addresses[i])
                                         : const_cast<char*>(p.bytes.data()));
    }
    driver.check(driver.launch(l.function, l.programs, 1, 1, l.threads, 1, 1, l.shared, stream,
                               parameters.data(), nullptr));
  }
};

// The kind of a call.
struct Key {
  std::vector<int64_t> parts;

  explicit Key(int64_t name) : parts{name} {}

  Key& add(int64_t number) {
    parts.push_back(number);
    return *this;
  }
  Key& add(double number) { return add(std::bit_cast<int64_t>(number)); }
  Key& add(const Tensor& t) {
    if (!t.defined()) return add(int64_t(-1));
    const bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    add(int64_t(t.scalar_type())).add(int64_t(t.device().index())).add(int64_t(aligned));
    add(t.dim());
    parts.insert(parts.end(), t.sizes().begin(), t.sizes().end());
    parts.insert(parts.end(), t.strides().begin(), t.strides().end());
    return *this;
  }

  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (const int64_t part : key.parts) hash = c10::hash_combine(hash, std::hash<int64_t>()(part));
    return hash;
  }
};

// The recordings of all kinds met so far; nullptr for a kind that cannot be recorded.
class Recordings {
 public:
  using Known = std::shared_ptr<const Recording>;

  std::optional<Known> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = known_.find(key);
    return found == known_.end() ? std::nullopt : std::optional(found->second);
  }

  void keep(const Key& key, Known recording) {
    const std::lock_guard lock(mutex_);
    if (known_.size() >= MOST) known_.clear();
    known_[key] = std::move(recording);
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    known_.clear();
  }

  static Recordings& all() {
    static auto* kept = new Recordings;
    return *kept;
  }

 private:
  static constexpr size_t MOST = 4096;
  std::mutex mutex_;
  std::unordered_map<Key, Known, KeyHash> known_;
};

inline bool same_address(const Tensor& a, const Tensor& b) {
  return a.defined() && b.defined() && a.data_ptr() == b.data_ptr();
}

// What is launched, as the first part of a key.
struct Launched {
  enum : int64_t { cross_entropy, vjp, softmax, log_softmax, contract, log_softmax_vjp, by_name };
};

// The results of what Python's function `name` launches for these tensors and numbers. It is called
// with them behind `record`, whether it is to record, and returns its results and the recording.
template <typename... Numbers>
inline std::vector<Tensor> launched(const Launcher& there, const char* name, Key key,
                             const std::vector<Tensor>& tensors, const Numbers&... numbers) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    // which of them lie at one address: a recording knows a tensor by it
    size_t first = 0;
    while (first < i && !same_address(tensors[first], tensors[i])) ++first;
    key.add(tensors[i]).add(int64_t(first));
  }
  const auto known = Recordings::all().find(key);
  if (known && *known) {
    if (auto found = (*known)->play(tensors)) return *found;
  }
  py::gil_scoped_acquire gil;
  py::list given;
  for (const Tensor& t : tensors) given.append(t.defined() ? py::cast(t) : py::none());
  const bool record = !known && Driver::get();
  const py::tuple answer = there.functions.at(name)(record, *given, numbers...);
  std::vector<Tensor> found;
  for (const py::handle result : py::cast<py::sequence>(answer[0])) {
    found.push_back(result.is_none() ? Tensor() : result.cast<Tensor>());
  }
  if (record) {
    auto made = answer[1].is_none() ? nullptr : answer[1].cast<std::shared_ptr<Recording>>();
    Recordings::all().keep(key, std::move(made));
  }
  return found;
}

// The key of a function's name and of its numbers, of the types that `Options.flat` has.
inline Key key_of(const std::string& name, const py::tuple& numbers) {
  Key key(Launched::by_name);
  for (const char letter : name) key.add(int64_t(letter));
  const auto add = [&key](py::handle x) {
    key.add(reinterpret_cast<int64_t>(Py_TYPE(x.ptr())));
    if (PyFloat_CheckExact(x.ptr())) return key.add(PyFloat_AS_DOUBLE(x.ptr()));
    if (THPDtype_Check(x.ptr())) return key.add(int64_t(reinterpret_cast<THPDtype*>(x.ptr())->scalar_type));
    return key.add(x.cast<int64_t>());
  };
  for (const py::handle x : numbers) {
    if (PyList_CheckExact(x.ptr())) {
      for (const py::handle number : py::reinterpret_borrow<py::list>(x)) add(number);
    } else {
      add(x);
    }
  }
  return key;
}

// The same as `launched`, for Python's own callers.
inline std::vector<Tensor> launched_by_name(const std::string& name,
                                            const std::vector<std::optional<Tensor>>& given,
                                            const py::tuple& numbers) {
  std::vector<Tensor> tensors;
  for (const auto& t : given) tensors.push_back(t.value_or(Tensor()));
  const Launcher* there = launcher_for(tensors.at(0));
  TORCH_CHECK(there, "nothing launches on ", tensors[0].device());
  return launched(*there, name.c_str(), key_of(name, numbers), tensors, *numbers);
}

// For Python: `Recording` and how to forget all of them.
inline void bind_launches(py::module_& m) {
  py::class_<Recording, std::shared_ptr<Recording>>(m, "Recording")
      .def(py::init([](const std::vector<Tensor>& allocated, std::vector<int64_t> results,
                       intptr_t watched) {
             auto made = std::make_shared<Recording>();
             for (const Tensor& t : allocated) {
               made->allocated.push_back({t.scalar_type(), t.sizes().vec(), t.strides().vec()});
             }
             made->results = std::move(results);
             made->watched = reinterpret_cast<const volatile int64_t*>(watched);
             return made;
           }))
      .def("add_launch", [](Recording& r, uintptr_t function, unsigned programs, unsigned threads,
                            unsigned shared, const std::vector<py::object>& parameters) {
        Recording::Launch l{reinterpret_cast<void*>(function), programs, threads, shared, {}};
        for (const py::object& p : parameters) {
          Recording::Parameter made{-1, {}};
          if (py::isinstance<py::bytes>(p)) {
            const std::string_view bytes = p.cast<std::string_view>();
            TORCH_CHECK(bytes.size() <= made.bytes.size());
            std::memcpy(made.bytes.data(), bytes.data(), bytes.size());
          } else {
            made.memory = p.cast<int64_t>();
          }
          l.parameters.push_back(made);
        }
        r.launches.push_back(std::move(l));
      });
  m.def("launched", launched_by_name);
  m.def("forget_recordings", [] { Recordings::all().clear(); });
}

}  // namespace custom_ops
