// Scratch that sums are added to begins as zero.
#pragma once

#include <cstdint>

namespace lcore::cuda {

struct ZeroArguments {
  double* data;
  int64_t count;
};

static __global__ void __launch_bounds__(128) zero_kernel(ZeroArguments a) {
  const int64_t item = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (item < a.count) a.data[item] = 0;
}

}  // namespace lcore::cuda
