// Cosines and sines of RoPE, and the rotation of a head by them.
// The angle is formed in turns, in double, and the product's rounding error is carried along: only the fraction of a
// turn reaches float, so the phase is exact to 1e-7 at ten million tokens, where a float product is off by half a
// radian.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/rotation.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

inline double read_number(const void* data, DType type, int64_t i) {
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

// Fraction of a turn in [-1/2, 1/2] of position * turns; fma gives the product's exact rounding error.
inline double fraction(double position, double turns) {
  const double product = position * turns;
  const double error = std::fma(position, turns, -product);
  return (product - std::nearbyint(product)) + error;
}

inline constexpr double kTwoPi = 6.283185307179586476925286766559;

// sin and cos of 2 pi t for |t| <= 1/2 (+ rounding): the nearest quarter turn is taken off, Taylor polynomials on
// |x| <= pi/4 (truncation 1e-9 and 3e-8), then the quadrant's swap and signs.
inline void sincos_turns(Vec<float> t, Vec<float>& sine, Vec<float>& cosine) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const Vec<float> shifted = t * 4.0f + kMagic;
  const auto quadrant = reinterpret_cast<Vec<int32_t>>(shifted);
  const Vec<float> x = (t - (shifted - kMagic) * 0.25f) * static_cast<float>(kTwoPi);
  const Vec<float> x2 = x * x;
  const Vec<float> s = x + x * x2 * (-1.0f / 6 + x2 * (1.0f / 120 + x2 * (-1.0f / 5040 + x2 * (1.0f / 362880))));
  const Vec<float> c = 1.0f + x2 * (-0.5f + x2 * (1.0f / 24 + x2 * (-1.0f / 720 + x2 * (1.0f / 40320))));
  const auto odd = (quadrant & 1) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  sine = (quadrant & 2) != 0 ? -sine : sine;
  cosine = ((quadrant + 1) & 2) != 0 ? -cosine : cosine;
}

// The pairs of a rotation in turns a position.
template <class T>
class Turns {
 public:
  explicit Turns(const Rotation& rotation) : turns_(rotation.half) {
    for (int m = 0; m < rotation.half; ++m) {
      turns_[m] = read_number(rotation.inv_freq, rotation.inv_freq_type, m) / kTwoPi;
    }
  }

  // Elements of `cosine` and of `sine`: whole vectors.
  int padded() const { return round_up_lanes<T>(std::max(static_cast<int>(turns_.size()), 1)); }

  // Of every pair at a position, both times scale, and the sine times `sign` too.
  void fill(double position, T scale, T sign, T* cosine, T* sine) const {
    const int half = static_cast<int>(turns_.size());
    if constexpr (std::is_same_v<T, float>) {
      for (int m = 0; m < half; ++m) cosine[m] = static_cast<float>(fraction(position, turns_[m]));
      std::fill(cosine + half, cosine + padded(), 0.0f);
      for (int m = 0; m < half; m += kLanes<float>) {
        Vec<float> s, c;
        sincos_turns(load(cosine + m), s, c);
        store(cosine + m, c * scale);
        store(sine + m, s * (scale * sign));
      }
    } else {
      for (int m = 0; m < half; ++m) {
        const double angle = fraction(position, turns_[m]) * kTwoPi;
        cosine[m] = std::cos(angle) * scale;
        sine[m] = std::sin(angle) * scale * sign;
      }
    }
  }

 private:
  std::vector<double> turns_;
};

// The pairs of x by these cosines and sines.
template <class T>
inline void rotate(const Rotation& r, const T* __restrict cosine, const T* __restrict sine, T* __restrict x) {
  const int step = r.interleaved ? 2 : 1;
  const int other = r.interleaved ? 1 : r.half;
  int m = 0;
  for (; !r.interleaved && m + kLanes<T> <= r.half; m += kLanes<T>) {
    const Vec<T> a = load(x + m), b = load(x + m + r.half);
    store(x + m, a * load(cosine + m) - b * load(sine + m));
    store(x + m + r.half, b * load(cosine + m) + a * load(sine + m));
  }
  for (; m < r.half; ++m) {
    const T a = x[m * step], b = x[m * step + other];
    x[m * step] = a * cosine[m] - b * sine[m];
    x[m * step + other] = b * cosine[m] + a * sine[m];
  }
}

}  // namespace lcore::cpu::LCORE_ISA
