// Rotary position embedding (Su et al. 2021, RoFormer): each pair (x, y) of a head at position p turns by the angle
// p * inv_freq[m]:  x' = x cos - y sin,  y' = y cos + x sin, both times attention_scaling.
// The angle is formed in turns, in double, and the product's rounding error is carried along: only the fraction of a
// turn reaches float, so the phase is exact to 1e-7 at ten million tokens, where a float product is off by half a
// radian.
#include "core/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;
constexpr int kBlock = 64;  // positions an item: enough to pay for waking a thread

double read(const void* data, DType type, int64_t i) {
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
double fraction(double position, double turns) {
  const double product = position * turns;
  const double error = std::fma(position, turns, -product);
  return (product - std::nearbyint(product)) + error;
}

// sin and cos of 2 pi t for |t| <= 1/2 (+ rounding): the nearest quarter turn is taken off, Taylor polynomials on
// |x| <= pi/4 (truncation 1e-9 and 3e-8), then the quadrant's swap and signs.
void sincos_turns(Vec<float> t, Vec<float>& sine, Vec<float>& cosine) {
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

template <class T>
void fill_table(const RopeParams& p, const std::vector<double>& turns, double position, T* cosine, T* sine) {
  const T scale = static_cast<T>(p.attention_scaling);
  const T sign = p.inverse ? T{-1} : T{1};
  if constexpr (std::is_same_v<T, float>) {
    for (int m = 0; m < p.half; ++m) cosine[m] = static_cast<float>(fraction(position, turns[m]));
    for (int m = 0; m < p.half; m += kLanes<float>) {
      Vec<float> s, c;
      sincos_turns(load(cosine + m), s, c);
      store(cosine + m, c * scale);
      store(sine + m, s * (scale * sign));
    }
  } else {
    for (int m = 0; m < p.half; ++m) {
      const double angle = fraction(position, turns[m]) * kTwoPi;
      cosine[m] = std::cos(angle) * scale;
      sine[m] = std::sin(angle) * scale * sign;
    }
  }
}

template <class T>
void rotate(const RopeParams& p, const T* __restrict cosine, const T* __restrict sine, T* __restrict x) {
  const int step = p.interleaved ? 2 : 1;
  const int other = p.interleaved ? 1 : p.half;
  for (int m = 0; m < p.half; ++m) {
    const T a = x[m * step], b = x[m * step + other];
    x[m * step] = a * cosine[m] - b * sine[m];
    x[m * step + other] = b * cosine[m] + a * sine[m];
  }
}

template <class T>
void run(const RopeParams& p, Executor& executor) {
  std::vector<double> turns(p.half);
  for (int m = 0; m < p.half; ++m) turns[m] = read(p.inv_freq, p.inv_freq_type, m) / kTwoPi;
  const int padded = round_up_lanes<T>(std::max(p.half, 1));
  const Scratch scratch(bytes_of<T>(2 * padded + round_up_lanes<T>(p.head_dim)), executor.workers());
  const int64_t blocks = (p.seq + kBlock - 1) / kBlock;
  executor.run(p.batch * blocks, [&](int64_t item, int worker) {
    T* cosine = scratch.of<T>(worker);
    T* sine = cosine + padded;
    T* head = sine + padded;
    std::fill(cosine, head, T{0});
    const int64_t batch = item / blocks;
    const int64_t begin = item % blocks * kBlock;
    for (int64_t i = begin; i < std::min(begin + kBlock, p.seq); ++i) {
      const int64_t at = batch * p.positions_batch + i * p.positions_seq;
      fill_table(p, turns, read(p.positions, p.positions_type, at), cosine, sine);
      for (int64_t h = 0; h < p.heads; ++h) {
        with_type(p.x.data, p.type, [&](const auto* x) {
          load_row(x + batch * p.x.batch + i * p.x.seq + h * p.x.head, p.x.dim, head, p.head_dim);
        });
        rotate(p, cosine, sine, head);
        const int64_t offset = ((batch * p.seq + i) * p.heads + h) * p.head_dim;
        store_row(head, p.head_dim, static_cast<char*>(p.out) + offset * static_cast<int64_t>(size_of(p.type)), p.type);
      }
    }
  });
}

}  // namespace

void rope(const RopeParams& p, Executor& executor) {
  if (p.type == DType::kFloat64) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
