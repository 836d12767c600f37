// torch's current CUDA stream without linking libtorch_cuda, so that one library loads on a CPU-only torch too.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/library.h"

namespace lcore {

inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  // A CUDA tensor exists, so torch has loaded the library already; it is only looked up.
  static const auto getter = reinterpret_cast<Getter>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW), "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(getter != nullptr, "lcore: this torch has no CUDA stream; install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS, "lcore: torch did not give its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lcore
