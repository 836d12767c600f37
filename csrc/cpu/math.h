// Vector functions: exp with a stated error for the softmax, exp2 for any number, and tanh.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// 2^r for |r| <= 1/2: 1 + r q(r), q the quartic that minimises the relative error (1.1e-7). 2^0 is 1 exactly.
inline Vec<float> exp2_fraction(Vec<float> r) {
  Vec<float> p = splat(0.0013264727f) * r + 0.009671513f;
  p = p * r + 0.055507336f;
  p = p * r + 0.24022242f;
  p = p * r + 0.693147f;
  return p * r + 1.0f;
}

// e^x = 2^n * 2^r with n = round(x log2 e); log2 e in one float adds 1.3e-8 |x|: error below 3 ulp for x in [-8, 8],
// below 12 ulp to -87, where a weight counts for nothing. exp(0) is 1 exactly; below -87.3 (the smallest normal float)
// the result is 0, so exp(-inf) = 0.
inline Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const V shifted = x * kLog2E + kMagic;
  const V p = exp2_fraction(x * kLog2E - (shifted - kMagic));
  // Unsigned, because it may wrap: for n < 0 to what it should be, for x out of range to what nobody uses.
  const auto scale = (reinterpret_cast<Vec<uint32_t>>(shifted) << 23) + 0x3f800000u;
  const V result = p * reinterpret_cast<V>(scale);
  return x < -87.3f ? V{} : result;
}

// float64 runs for gradient checks, where the library's accuracy matters and its speed does not.
inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 2^x for any x: 0 below -126.5, infinity from 128 on, NaN for NaN; error below 3 ulp between.
inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  // Adding it leaves n + 127 in the low bits: shifted up, they are the exponent, 0 for n = -127, infinity for 128.
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = clamp(x, -127.0f, 128.0f);
  const V shifted = x + kMagic;
  const V p = exp2_fraction(x - (shifted - kMagic));
  return p * reinterpret_cast<V>(reinterpret_cast<Vec<uint32_t>>(shifted) << 23);
}

inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// tanh x, relative error below 8 ulp: the odd Taylor polynomial of degree 11 for |x| < 0.3 (truncation 2e-9), where the
// other form, 1 - 2 / (e^2x + 1), would cancel.
inline Vec<float> tanh(Vec<float> x) {
  // Past 10 the result is 1 to the last bit, and exp must not overflow.
  const Vec<float> bounded = x > 10.0f ? splat(10.0f) : (x < -10.0f ? splat(-10.0f) : x);
  const Vec<float> large = 1.0f - 2.0f / (exp(bounded * 2.0f) + 1.0f);
  const Vec<float> z = x * x;
  Vec<float> p = splat(-1382.0f / 155925) * z + 62.0f / 2835;
  p = p * z - 17.0f / 315;
  p = p * z + 2.0f / 15;
  p = p * z - 1.0f / 3;
  return z < 0.09f ? x + x * (z * p) : large;
}

inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

}  // namespace lcore::cpu::LCORE_ISA
