// The gates of recurrent layers and their slopes, as cpu/gates.h has them: sigmoid, SiLU, softplus.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/ptx/exp2.h"

namespace lcore::cuda {

template <class X>
constexpr X kLog2E = static_cast<X>(1.4426950408889634);

__device__ inline float power_of_two(float x) { return exp2_approx(x); }
__device__ inline double power_of_two(double x) { return exp2(x); }

// 1 / x; 0 for infinity.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ inline double reciprocal(double x) { return 1.0 / x; }

// 1 / (1 + e^-x); 0 at -inf and 1 at inf.
template <class X>
__device__ inline X sigmoid(X x) {
  return reciprocal(X{1} + power_of_two(x * -kLog2E<X>));
}

template <class X>
__device__ inline X silu(X x) {
  return x * sigmoid(x);
}

// d silu(x) / dx from x and its sigmoid.
template <class X>
__device__ inline X silu_slope(X x, X sigmoid_x) {
  return sigmoid_x * (X{1} + x * (X{1} - sigmoid_x));
}

// Above it softplus is the identity, as in torch.
constexpr int kSoftplusThreshold = 20;

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|).
template <class X>
__device__ inline X softplus(X x) {
  const X above = x > X{0} ? x : X{0};
  const X soft = above + log1p(power_of_two((x > X{0} ? -x : x) * kLog2E<X>));
  return x > X{kSoftplusThreshold} ? x : soft;
}

template <class X>
__device__ inline X softplus_slope(X x) {
  return x > X{kSoftplusThreshold} ? X{1} : sigmoid(x);
}

}  // namespace lcore::cuda
