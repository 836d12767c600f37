// Where a kernel runs, and the memory it may use meanwhile: what Executor is to the CPU kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace lcore::cuda {

class Stream {
 public:
  explicit Stream(cudaStream_t handle) : handle_(handle) {}
  virtual ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t handle() const { return handle_; }

  // Uninitialised device memory, aligned to 16 bytes, for the kernels launched here until the object dies. Under a CUDA
  // graph it belongs to the graph.
  virtual void* scratch(size_t bytes) = 0;

  template <class T>
  T* scratch_of(size_t count) {
    return static_cast<T*>(scratch(count * sizeof(T)));
  }

 private:
  cudaStream_t handle_;
};

}  // namespace lcore::cuda
