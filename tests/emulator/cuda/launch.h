// csrc/cuda/launch.h for the emulator: the same names, found first on the include path.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"
#include "grid.h"

namespace lcore::cuda {

// So little that tests meet windows.
constexpr int64_t kPartialBytes = int64_t{16} << 10;

inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error("lcore: " + what + " failed");
}

// Not instrumented: it reads host memory, as a launch does.
template <class Params>
__attribute__((no_sanitize("thread"))) void invoke(const void* kernel, const void* params) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(params));
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream&, const Params& params) {
  emulator::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, &params, invoke<Params>});
}

}  // namespace lcore::cuda
