// Cosines and sines of RoPE, as csrc/cpu/rope/turns.h: the angle is formed in turns, in double, and the product's
// rounding error is carried along, so that the phase is exact to 1e-7 at ten million tokens.
#pragma once

#include "core/rotation.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda {

__device__ inline double read_number(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    case DType::kInt32:
      return static_cast<const int32_t*>(data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    default:
      return static_cast<const float*>(data)[i];
  }
}

// Cosine and sine of pair m at a position, without attention_scaling.
template <class X>
__device__ inline void turn(const Rotation& rotation, int m, double position, X& cosine, X& sine) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const double turns = read_number(rotation.inv_freq, rotation.inv_freq_type, m) / kTwoPi;
  const double product = position * turns;
  const double fraction = (product - nearbyint(product)) + fma(position, turns, -product);
  if constexpr (sizeof(X) == 8)
    sincospi(2 * fraction, &sine, &cosine);
  else
    sincospif(2 * static_cast<float>(fraction), &sine, &cosine);
}

// (x, y) turned; one way to round, wherever a pair stands.
template <class X>
__device__ inline void rotate(X cosine, X sine, X& x, X& y) {
  const X turned = fma(x, cosine, -(y * sine));
  y = fma(y, cosine, x * sine);
  x = turned;
}

}  // namespace lcore::cuda
