// The grid of a group of values, and the nearest codes on it: rounded as csrc/cpu/cache/encode.h says, to the same
// bits.
#pragma once

#include "core/page_format.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda::generic {

// x in float16, rounded up or down.
__device__ inline __half half_beyond(float x, bool up) {
  constexpr float kMost = 65504.0f;
  if (!(fabsf(x) < kMost)) return __float2half_rn(fminf(fmaxf(x, -kMost), kMost));
  const __half nearest = __float2half_rn(x);
  const float value = __half2float(nearest);
  if (up ? value >= x : value <= x) return nearest;
  const unsigned short bits = __half_as_ushort(nearest);
  if ((bits & 0x7fffu) == 0) return __ushort_as_half(up ? 0x0001u : 0x8001u);
  const bool grows = ((bits & 0x8000u) == 0) == up;
  return __ushort_as_half(static_cast<unsigned short>(grows ? bits + 1 : bits - 1));
}

// Smallest and largest of a group, and NaN once a value was not finite.
struct Extent {
  float low = INFINITY;
  float high = -INFINITY;
  float spoilt = 0;

  __device__ void add(float x) { join({x, x, x - x}); }
  __device__ void join(const Extent& later) {
    low = later.low < low ? later.low : low;
    high = later.high > high ? later.high : high;
    spoilt += later.spoilt;
  }
};

// What turns a group's values into codes: (x - origin) / step.
struct Grid {
  __half scale;
  __half zero;
  float step;
  float origin;
};

__device__ inline Grid grid_of(PageFormat format, const Extent& e) {
  const __half none = __ushort_as_half(0), unknown = __ushort_as_half(0x7e00u);
  const bool integer = is_integer(format);
  if (e.spoilt != 0) return {integer ? none : unknown, integer ? unknown : none, 1.0f, 0.0f};
  const __half zero = integer ? half_beyond(e.low, false) : none;
  const float origin = __half2float(zero), levels = static_cast<float>((1 << bits_of(format)) - 1);
  const __half scale = integer ? half_beyond(fmaxf(e.high - origin, 0.0f) / levels, true)
                               : half_beyond(fmaxf(e.high, -e.low) / 448.0f, true);
  const float step = __half2float(scale);
  return {scale, zero, step == 0 ? 1.0f : step, origin};
}

// The nearest integer in [0, levels]; NaN gives 0.
__device__ inline uint32_t nearest_code(float x, float levels) {
  const float low = x > 0 ? x : 0;
  return static_cast<uint32_t>(rintf(low < levels ? low : levels));
}

// The nearest e4m3 number, saturated at 448; NaN gives 0.
__device__ inline uint8_t nearest_float8(float x) {
  const uint32_t bits = __float_as_uint(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  const float size = __uint_as_float(magnitude);
  if (!(size >= 0x1p-6f)) {  // subnormal: adding 2^14 rounds at the last bit, 2^-9
    return size < 0x1p-6f ? static_cast<uint8_t>(sign | (__float_as_uint(size + 0x1p14f) & 0xffu)) : 0;
  }
  const uint32_t rounded = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | (rounded < 0x7eu ? rounded : 0x7eu));
}

}  // namespace lcore::cuda::generic
