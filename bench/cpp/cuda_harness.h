// The harness for CUDA kernels: calls are timed by events, with a cold L2, and held to a large copy on the same device.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "harness.h"
#include "tensor.h"

namespace lcore::bench {

using cuda::check;

// Bytes on the device.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "cudaMalloc"); }
  explicit DeviceMemory(const Tensor& host) : DeviceMemory(static_cast<size_t>(host.bytes())) {
    check(cudaMemcpy(data_, host.data(), static_cast<size_t>(host.bytes()), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return data_; }
  void to_host(const Tensor& host) const {
    check(cudaMemcpy(host.data(), data_, static_cast<size_t>(host.bytes()), cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

 private:
  void* data_ = nullptr;
};

// The default stream. Its scratch memory is kept: calls are repeated, so each finds what an earlier one asked for.
class BenchStream final : public cuda::Stream {
 public:
  BenchStream() : Stream(nullptr) {}
  void* scratch(size_t bytes) override {
    if (next_ == held_.size()) held_.emplace_back(bytes, std::make_unique<DeviceMemory>(bytes));
    auto& [size, memory] = held_[next_++];
    if (size < bytes) {
      memory = std::make_unique<DeviceMemory>(bytes);
      size = bytes;
    }
    return memory->data();
  }
  // Before each call.
  void rewind() { next_ = 0; }

 private:
  std::vector<std::pair<size_t, std::unique_ptr<DeviceMemory>>> held_;
  size_t next_ = 0;
};

class CudaHarness final : public Harness {
 public:
  using Harness::Harness;
  ~CudaHarness() override {
    if (start_ != nullptr) cudaEventDestroy(start_);
    if (end_ != nullptr) cudaEventDestroy(end_);
  }

  BenchStream& stream() { return stream_; }
  double copy_gbytes() const { return copy_gbytes_; }

 protected:
  std::string measure_ceilings() override {
    constexpr size_t kBytes = size_t{1} << 30;
    check(cudaGetDeviceProperties(&device_, 0), "cudaGetDeviceProperties");
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    flush_ = std::make_unique<DeviceMemory>(kFlushBytes);
    const DeviceMemory from(kBytes), to(kBytes);
    check(cudaMemset(from.data(), 1, kBytes), "cudaMemset");
    std::vector<double> times;
    for (int i = 0; i < 11; ++i) {
      times.push_back(seconds_of([&] {
        check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, nullptr), "cudaMemcpyAsync");
      }));
    }
    std::nth_element(times.begin(), times.begin() + 5, times.end());
    copy_gbytes_ = 2 * static_cast<double>(kBytes) / times[5] / 1e9;
    char line[400];
    std::snprintf(line, sizeof line, "%s, %d multiprocessors; copy %.0f GB/s read and written", device_.name,
                  device_.multiProcessorCount, copy_gbytes_);
    return line;
  }

  Row ceilings() const override { return Row().set("copy_gbytes", copy_gbytes_); }

  Row about() const override {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    return Harness::about().set("gpu", device_.name).set("cuda_driver", driver).set("cuda_runtime", runtime);
  }

  double seconds_of(const std::function<void()>& call) override {
    stream_.rewind();
    check(cudaMemsetAsync(flush_->data(), 0, kFlushBytes, nullptr), "cudaMemsetAsync");
    check(cudaEventRecord(start_, nullptr), "cudaEventRecord");
    call();
    check(cudaEventRecord(end_, nullptr), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return milliseconds / 1e3;
  }

 private:
  static constexpr size_t kFlushBytes = 256 << 20;  // more than any L2
  cudaDeviceProp device_{};
  cudaEvent_t start_ = nullptr, end_ = nullptr;
  std::unique_ptr<DeviceMemory> flush_;
  BenchStream stream_;
  double copy_gbytes_ = 0;
};

}  // namespace lcore::bench
