// What the gates of an mLSTM are told. Written numbers and states are float, or double.
#pragma once

#include "core/sequences.h"

namespace lcore {

struct MlstmGateParams {
  bool is_double;
  Sequences sequences;
  int64_t heads;
  Series i;  // (batch, heads, steps), before any activation
  Series f;
  Series g;        // log-decay of a step, written
  Series weight;   // of its value, written
  Series m;        // what states are scaled down by, as a logarithm; written
  States initial;  // m (sequences, heads), or absent: 0
  States final;    // written; may be the initial one
};

struct MlstmGateGradParams {
  MlstmGateParams forward;  // g is not read, weight and m hold the forward's
  Series dg;
  Series dweight;
  const void* dm;  // (sequences, heads) of the final m, what the states it scales hold included; or nullptr
  Series di;       // written, as df
  Series df;
  void* dm_initial;  // (sequences, heads), or nullptr; without what the initial states hold
};

}  // namespace lcore
