// What a merge of two attention states is told. Tensors are contiguous; lse is float, or double when type is float64.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace lcore {

struct MergeParams {
  DType type;         // of out_a, out_b and out
  const void* out_a;  // (batch, seq, heads, head_dim)
  const void* out_b;
  const void* lse_a;  // (batch, heads, seq)
  const void* lse_b;
  void* out;
  void* lse;
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int64_t head_dim;
};

struct MergeGradParams {
  MergeParams forward;  // out and lse are not read
  const void* dout;     // (batch, seq, heads, head_dim)
  const void* dlse;     // (batch, heads, seq)
  void* dout_a;
  void* dlse_a;
  void* dout_b;
  void* dlse_b;
};

}  // namespace lcore
