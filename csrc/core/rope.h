// What a RoPE kernel is told.
#pragma once

#include "core/attention.h"
#include "core/rotation.h"

namespace lcore {

struct RopeParams {
  DType type;  // of x and out
  Strided x;   // (batch, seq, heads, head_dim)
  void* out;   // (batch, seq, heads, head_dim) contiguous
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int head_dim;
  Rotation rotation;
  const void* positions;  // (seq) or (batch, seq) of positions_type
  DType positions_type;
  int64_t positions_batch;  // elements between batches of positions, and between its rows
  int64_t positions_seq;
  bool inverse;  // rotates back
};

}  // namespace lcore
