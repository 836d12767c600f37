// Reductions over the lanes of a warp; every lane gets the result. In a fixed order, so that the bits repeat.
#pragma once

#include "cuda/numeric.cuh"

namespace lcore::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Over groups of kGroup neighbouring lanes.
template <int kGroup = kWarpLanes, class X>
__device__ inline X reduce_add(X x) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// NaN is dropped, as fmax drops it.
template <int kGroup = kWarpLanes, class X>
__device__ inline X reduce_max(X x) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

}  // namespace lcore::cuda
