// The gates of recurrent layers and their slopes: sigmoid, SiLU, softplus, log sigmoid.
#pragma once

#include "cpu/math.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
inline constexpr T kLog2E = static_cast<T>(1.4426950408889634);

// 1 / (1 + e^-x); 0 at -inf and 1 at inf.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T{1} / (exp2(x * -kLog2E<T>) + T{1});
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
  return x * sigmoid<T>(x);
}

// d silu(x) / dx from x and its sigmoid.
template <class T>
inline Vec<T> silu_slope(Vec<T> x, Vec<T> sigmoid_x) {
  return sigmoid_x * (T{1} + x * (T{1} - sigmoid_x));
}

// ln(1 + x) for x in [0, 1], relative error below 3 ulp: 2 atanh(s) with s = x / (2 + x) <= 1/3, whose series in s^2
// ends after s^12 with 1e-8.
inline Vec<float> log1p_of_fraction(Vec<float> x) {
  const Vec<float> s = x / (x + 2.0f);
  const Vec<float> q = s * s;
  Vec<float> p = splat(2.0f / 13) * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return p * s;
}

inline Vec<double> log1p_of_fraction(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

// ln(1 / (1 + e^-x)) = min(x, 0) - ln(1 + e^-|x|); its slope is sigmoid(-x).
template <class T>
inline Vec<T> log_sigmoid(Vec<T> x) {
  const Vec<T> below = x < T{0} ? x : Vec<T>{};
  return below - log1p_of_fraction(exp2((x < T{0} ? x : -x) * kLog2E<T>));
}

// Above it softplus is the identity, as in torch.
inline constexpr int kSoftplusThreshold = 20;

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|).
template <class T>
inline Vec<T> softplus(Vec<T> x) {
  const Vec<T> above = x > T{0} ? x : Vec<T>{};
  const Vec<T> soft = above + log1p_of_fraction(exp2((x > T{0} ? -x : x) * kLog2E<T>));
  return x > T{kSoftplusThreshold} ? x : soft;
}

template <class T>
inline Vec<T> softplus_slope(Vec<T> x) {
  return x > T{kSoftplusThreshold} ? splat(T{1}) : sigmoid<T>(x);
}

}  // namespace lcore::cpu::LCORE_ISA
