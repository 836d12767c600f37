// csrc/torch/device.h for the emulator: found first on the include path. The ops get a library of their own,
// torch.ops.lcore_emulated, in which CPU tensors play the GPU's: kernels may touch a call's arguments and results, and
// nothing else. New memory holds NaN.
#pragma once

#include <cstring>
#include <memory>

#include "cuda/kernels.h"
#include "memory.h"
#include "torch/library.h"

#define LCORE_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(lcore_emulated, m)

namespace lcore {

// The running call's memory.
inline std::vector<std::unique_ptr<emulator::Registered>>& device_memory() {
  static std::vector<std::unique_ptr<emulator::Registered>> memory;
  return memory;
}

inline void add_device_memory(const Tensor& tensor, const std::string& name) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.strides()[i];
  device_memory().push_back(std::make_unique<emulator::Registered>(
      tensor.data_ptr(), static_cast<size_t>(last + 1) * tensor.element_size(), name + " " + shape_text(tensor)));
}

inline bool on_gpu(const Tensor&) { return true; }

inline Tensor dense(const Tensor& tensor) {
  Tensor copy = torch::stable::contiguous(tensor);
  add_device_memory(copy, "a dense copy");
  return copy;
}

inline Tensor poisoned(Tensor tensor) {
  std::memset(tensor.data_ptr(), 0xff, static_cast<size_t>(tensor.numel()) * tensor.element_size());
  add_device_memory(tensor, "new memory");
  return tensor;
}

class Arguments {
 public:
  Arguments() { device_memory().clear(); }
  ~Arguments() { device_memory().clear(); }
  void add(const Tensor& tensor) { add_device_memory(tensor, "argument " + std::to_string(++position_)); }
  void add(const OptionalTensor& tensor) {
    if (tensor.has_value()) return add(*tensor);
    ++position_;
  }
  template <class T>
  void add(const T&) {
    ++position_;
  }

 private:
  int position_ = 0;
};

template <auto fn>
struct OnDevice;
template <class R, class... A, R (*fn)(A...)>
struct OnDevice<fn> {
  static R call(A... arguments) {
    Arguments memory;
    (memory.add(arguments), ...);
    return fn(std::move(arguments)...);
  }
};

class KernelLibrary {
 public:
  explicit KernelLibrary(torch::stable::detail::StableLibrary& library) : library_(library) {}
  template <auto fn>
  void impl(const char* op) const {
    library_.impl(op, TORCH_BOX(&OnDevice<fn>::call));
  }

 private:
  torch::stable::detail::StableLibrary& library_;
};

class TorchStream final : public cuda::Stream {
 public:
  explicit TorchStream(const Tensor& at) : Stream(nullptr), at_(at) {}
  void* scratch(size_t bytes) override {
    held_.push_back(new_tensor(at_, {static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte));
    return held_.back().data_ptr();
  }

 private:
  Tensor at_;
  std::vector<Tensor> held_;
};

#define LCORE_RUN(op, at, params)        \
  {                                      \
    ::lcore::TorchStream stream(at);     \
    ::lcore::cuda::op((params), stream); \
  }

#define LCORE_KERNELS(m)                                                                                      \
  static void lcore_kernels(const ::lcore::KernelLibrary&);                                                   \
  STABLE_TORCH_LIBRARY_IMPL(lcore_emulated, CPU, library) { lcore_kernels(::lcore::KernelLibrary(library)); } \
  static void lcore_kernels(const ::lcore::KernelLibrary& m)

}  // namespace lcore
