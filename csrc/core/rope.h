// What a RoPE kernel is told.
#pragma once

#include "core/attention.h"

namespace lcore {

struct RopeParams {
  DType type;  // of x and out
  Strided x;   // (batch, seq, heads, head_dim)
  void* out;   // (batch, seq, heads, head_dim) contiguous
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int head_dim;
  int half;               // rotated pairs; dims from 2 * half on pass through
  const void* positions;  // (seq) or (batch, seq) of positions_type
  DType positions_type;
  int64_t positions_batch;  // elements between batches of positions, and between its rows
  int64_t positions_seq;
  const void* inv_freq;  // [half] of inv_freq_type, radians a position
  DType inv_freq_type;
  double attention_scaling;  // multiplies cos and sin
  bool interleaved;          // pairs (2m, 2m + 1); else (m, m + half)
  bool inverse;              // rotates back
};

}  // namespace lcore
