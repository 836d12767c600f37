// The one way to launch a kernel, and the one way to report a CUDA error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace lcore::cuda {

// Scratch for sums that several blocks leave for another kernel to add up: what does not fit is taken in windows.
constexpr int64_t kPartialBytes = int64_t{256} << 20;

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("lcore: " + what + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// LCORE_CUDA_SYNC=1: every launch waits, so that a fault is reported under the name of the kernel that made it.
inline bool waits_for_kernels() {
  static const bool waits = [] {
    const char* value = std::getenv("LCORE_CUDA_SYNC");
    return value != nullptr && std::string(value) == "1";
  }();
  return waits;
}

inline std::string name_of(const void* kernel) {
  const char* name = nullptr;
  return cudaFuncGetName(&name, kernel) == cudaSuccess ? name : "a kernel";
}

// Every kernel takes its Params by value as its only argument.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream& stream, const Params& params) {
  constexpr size_t kUnasked = 48 << 10;  // more dynamic shared memory than this must be asked for
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kUnasked) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "asking for " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t status = cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream.handle());
  if (status != cudaSuccess) check(status, "the launch of " + name_of(function));
  if (waits_for_kernels()) {
    const cudaError_t fault = cudaStreamSynchronize(stream.handle());
    if (fault != cudaSuccess) check(fault, name_of(function));
  }
}

}  // namespace lcore::cuda
