// What a selective scan is told. Parameters and states are float, or double when u is float64.
#pragma once

#include "core/sequences.h"

namespace lcore {

struct SelectiveScanParams {
  bool is_double;  // what is summed, and A, D, delta_bias and the checkpoints
  Sequences sequences;
  int64_t dim;
  int64_t groups;  // divides dim
  int states;
  bool delta_softplus;

  Series u;
  Series delta;
  Series z;  // gate, or absent
  Series b;  // (batch, groups, states, steps): channel is the stride of a state
  Series c;
  int64_t b_group;  // elements between groups
  int64_t c_group;
  const void* a;           // (dim, states) contiguous
  const void* d;           // [dim] or nullptr
  const void* delta_bias;  // [dim] or nullptr

  Series out;         // written; absent in the backward
  States initial;     // (sequences, dim, states), or absent: zero
  States final;       // written; may be the initial ones, or absent
  void* checkpoints;  // (chunk slots, states, dim): the state at the start of each chunk, or nullptr
};

struct SelectiveScanGradParams {
  SelectiveScanParams forward;  // out and final are not read, checkpoints hold the forward's
  Series dout;
  const void* dfinal;  // (sequences, dim, states) contiguous, or nullptr
  Series du;           // written, as the next two
  Series ddelta;
  Series dz;  // absent without z
  Series db;  // (batch, groups, states, steps) contiguous
  Series dc;
  void* da;           // (dim, states)
  void* dd;           // [dim], or nullptr
  void* ddelta_bias;  // [dim], or nullptr
  void* dinitial;     // (sequences, dim, states), or nullptr
};

}  // namespace lcore
