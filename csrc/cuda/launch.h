// The one way to launch a kernel, and the one way to report a CUDA error.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lcore::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("lcore: ") + what + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Every kernel takes its Params by value as its only argument.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream),
        "kernel launch");
}

}  // namespace lcore::cuda
