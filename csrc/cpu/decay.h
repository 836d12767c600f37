// The decay of a state in a step: e^(step * A), given rate = A log2 e. Products of thousands of decays stand behind a
// state, so the polynomial is exact to rounding, and the product enters the reduction unrounded (two fused
// multiply-adds).
#pragma once

#include "cpu/gates.h"

namespace lcore::cpu::LCORE_ISA {

// |step * rate| up to which the bounded form is right; beyond, results may leave the range of normal numbers.
inline constexpr float kDecayBound = 126.0f;

// 2^(step * rate): 2^n * 2^r, n the nearest integer; 2^r = 1 + r q(r), q the quintic that minimises the relative error
// (2e-9). Error below 1 ulp. Unbounded: 0 below 2^-126.5, infinity from 2^128 on, NaN for NaN, and the same bits
// between.
template <bool kBounded>
inline Vec<float> decay(Vec<float> step, Vec<float> rate) {
  using V = Vec<float>;
  constexpr float kMagic = 12582912.0f + 127.0f;  // as in exp2 (math.h)
  V shifted = step * rate + kMagic;
  if constexpr (!kBounded) shifted = clamp(shifted, kMagic - 127.0f, kMagic + 128.0f);
  V r = step * rate - (shifted - kMagic);
  if constexpr (!kBounded) r = clamp(r, -0.5f, 0.5f);
  V p = splat(1.5353362e-4f) * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 0.24022648f;
  p = p * r + 0.69314718f;
  p = p * r + 1.0f;
  return p * reinterpret_cast<V>(reinterpret_cast<Vec<uint32_t>>(shifted) << 23);
}

template <bool kBounded>
inline Vec<double> decay(Vec<double> step, Vec<double> rate) {
  return exp2(step * rate);
}

}  // namespace lcore::cpu::LCORE_ISA
