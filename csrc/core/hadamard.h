// What a signed Hadamard transform is told.
#pragma once

#include "core/attention.h"

namespace lcore {

struct HadamardParams {
  DType type;  // of x and out
  Strided x;   // (batch, seq, heads, dim)
  void* out;   // (batch, seq, heads, dim) contiguous
  int64_t batch;
  int64_t seq;
  int64_t heads;
  int dim;
  bool inverse;
};

}  // namespace lcore
