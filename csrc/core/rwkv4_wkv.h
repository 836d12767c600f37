// What the WKV of RWKV-4 is told. Parameters and states are float, or double when k is float64.
#pragma once

#include "core/sequences.h"

namespace lcore {

struct Rwkv4Params {
  bool is_double;
  Sequences sequences;
  int64_t dim;
  const void* w;  // [dim]: log-decay
  const void* u;  // [dim]
  Series k;       // (batch, dim, steps)
  Series v;
  Series out;      // written; absent in the backward
  States initial;  // (sequences, 3, dim): aa, bb, pp; or absent
  States final;    // written; may be the initial ones
};

struct Rwkv4GradParams {
  Rwkv4Params forward;  // out and final are not read
  Series dout;
  const void* dfinal;  // (sequences, 3, dim) contiguous, or nullptr
  Series dk;           // written, as dv
  Series dv;
  void* dw;        // [dim]
  void* du;        // [dim]
  void* dinitial;  // (sequences, 3, dim), or nullptr
};

}  // namespace lcore
