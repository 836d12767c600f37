// Which pairs of a head RoPE turns, and how far a position.
#pragma once

#include "core/dtype.h"

namespace lcore {

struct Rotation {
  const void* inv_freq;  // [half] of inv_freq_type, radians a position
  DType inv_freq_type;
  int half;                  // rotated pairs; dims from 2 * half on pass through
  double attention_scaling;  // multiplies cos and sin
  bool interleaved;          // pairs (2m, 2m + 1); else (m, m + half)
};

}  // namespace lcore
