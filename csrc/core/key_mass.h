// What the attention mass of keys is told.
#pragma once

#include "core/attention.h"

namespace lcore {

struct KeyMassParams {
  AttentionParams attention;  // lse is read; v, out and sinks are not (a sink is in the lse)
  void* mass;                 // (batch, kv_heads, keys) or (kv_heads, tokens), of lse's type
  int64_t mass_batch;         // elements between batches of mass (0 when packed) and between its heads
  int64_t mass_head;
  bool largest;  // of a key's weights the largest, instead of their sum
};

}  // namespace lcore
