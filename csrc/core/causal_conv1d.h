// What a causal depthwise convolution is told. Parameters are float, or double when x is float64.
#pragma once

#include "core/sequences.h"

namespace lcore {

inline constexpr int kMaxConvWidth = 8;

struct CausalConv1dParams {
  bool is_double;  // what is summed, and weight and bias
  Sequences sequences;
  int64_t dim;
  int width;  // 1 to kMaxConvWidth
  bool silu;

  Series x;
  const void* weight;  // (dim, width) contiguous
  const void* bias;    // [dim] or nullptr
  Series out;          // written; absent in the backward
  States initial;      // (sequences, dim, width - 1): the steps before the first, or absent: zero
  States final;        // written: the last steps; may be the initial ones, or absent
};

struct CausalConv1dGradParams {
  CausalConv1dParams forward;  // out and final are not read
  Series dout;
  States dfinal;    // or absent
  Series dx;        // written
  States dinitial;  // written, or absent
  void* dweight;    // (dim, width)
  void* dbias;      // [dim], or nullptr
};

}  // namespace lcore
