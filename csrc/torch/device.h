// One function an op, for CPU and CUDA tensors alike: it checks its arguments and fills Params; LCORE_RUN calls the
// kernel where the tensors are; LCORE_KERNELS registers the function for each device. The emulator has a twin of this
// file (tests/emulator/torch/device.h) that runs the CUDA kernels on CPU tensors.
#pragma once

#include "cpu/kernels.h"
#include "torch/library.h"
#ifdef LCORE_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#endif

#define LCORE_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m)

namespace lcore {

// Whether kernels, not the host, read this tensor's values: the host must not look at them.
inline bool on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }

// Contiguous, as a kernel is to see it.
inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// New memory: nothing to do where it is real.
inline Tensor poisoned(Tensor tensor) { return tensor; }

// The tensors of a call, which must be on one device.
class OneDevice {
 public:
  void add(const Tensor& tensor) {
    if (!first_.has_value()) first_ = tensor;
    STD_TORCH_CHECK(tensor.is_cuda() == first_->is_cuda() && tensor.get_device_index() == first_->get_device_index(),
                    "lcore: every tensor of a call must be on one device");
  }
  void add(const OptionalTensor& tensor) {
    if (tensor.has_value()) add(*tensor);
  }
  template <class T>
  void add(const T&) {}

  const Tensor& first() const { return *first_; }

 private:
  OptionalTensor first_;
};

// fn, called with its tensors' device as the current one.
template <auto fn>
struct OnDevice;
template <class R, class... A, R (*fn)(A...)>
struct OnDevice<fn> {
  static R call(A... arguments) {
    OneDevice device;
    (device.add(arguments), ...);
#ifdef LCORE_WITH_CUDA
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (on_gpu(device.first())) guard.emplace(device.first().get_device_index());
#endif
    return fn(std::move(arguments)...);
  }
};

class KernelLibrary {
 public:
  explicit KernelLibrary(torch::stable::detail::StableLibrary& library) : library_(library) {}
  template <auto fn>
  void impl(const char* op) const {
    static_assert(check_kernel(fn), "check_kernel refuses with a reason of its own");
    library_.impl(op, TORCH_BOX(&OnDevice<fn>::call));
  }

 private:
  torch::stable::detail::StableLibrary& library_;
};

#ifdef LCORE_WITH_CUDA
// torch's current stream and allocator. The stream is looked up, not linked, so that one library loads on a CPU-only
// torch too: a CUDA tensor exists, so torch has loaded its CUDA library.
class TorchStream final : public cuda::Stream {
 public:
  explicit TorchStream(const Tensor& at) : Stream(current(at.get_device_index())), at_(at) {}

  // The allocator gives memory back to the same stream only, so it may be freed while the kernel still runs.
  void* scratch(size_t bytes) override {
    held_.push_back(new_tensor(at_, {static_cast<int64_t>(bytes)}, torch::headeronly::ScalarType::Byte));
    return held_.back().data_ptr();
  }

 private:
  static cudaStream_t current(int32_t device) {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const auto getter = reinterpret_cast<Getter>(
        dlsym(dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW), "aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(getter != nullptr, "lcore: this torch has no CUDA stream; install a CUDA build of torch");
    void* stream = nullptr;
    STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, "lcore: torch did not give its current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

  Tensor at_;
  std::vector<Tensor> held_;
};

#define LCORE_RUN_CUDA(op, at, params)   \
  if ((at).is_cuda()) {                  \
    ::lcore::TorchStream stream(at);     \
    ::lcore::cuda::op((params), stream); \
  } else
#define LCORE_CUDA_KERNELS \
  STABLE_TORCH_LIBRARY_IMPL(lcore, CUDA, library) { lcore_kernels(::lcore::KernelLibrary(library)); }
#else
#define LCORE_RUN_CUDA(op, at, params)
#define LCORE_CUDA_KERNELS
#endif

// The kernel `op` on params, where the tensor `at` is.
#define LCORE_RUN(op, at, params)                   \
  LCORE_RUN_CUDA(op, at, params) {                  \
    ::lcore::TorchExecutor executor;                \
    ::lcore::cpu::kernels().op((params), executor); \
  }

// LCORE_KERNELS(m) { m.impl<lcore::hadamard>("hadamard"); }: for every device of this build.
#define LCORE_KERNELS(m)                                                                             \
  static void lcore_kernels(const ::lcore::KernelLibrary&);                                          \
  STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, library) { lcore_kernels(::lcore::KernelLibrary(library)); } \
  LCORE_CUDA_KERNELS                                                                                 \
  static void lcore_kernels(const ::lcore::KernelLibrary& m)

}  // namespace lcore
