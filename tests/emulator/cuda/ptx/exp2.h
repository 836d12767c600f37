// csrc/cuda/ptx/exp2.h, exact to rounding.
#pragma once

#include <cmath>

namespace lcore::cuda {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace lcore::cuda
