// What recurrent kernels share: tensors over (batch, channels, steps), packed sequences, and where a sequence is cut.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace lcore {

// (batch, channels, steps) by strides in elements; data is nullptr where a tensor is absent.
struct Series {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t batch = 0;
  int64_t channel = 0;
  int64_t step = 0;
};

// States of sequences, (slots, channels, values) contiguous; a sequence's slot is slots[i], or i itself. A sequence
// whose slot is negative is left out.
struct States {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  const int64_t* slots = nullptr;
};

// Rows of `steps` steps, each one sequence; or one row that holds `count` sequences, i from offsets[i] to
// offsets[i + 1].
struct Sequences {
  int64_t batch;
  int64_t steps;
  const int32_t* offsets;  // [count + 1] or nullptr
  int64_t count;           // batch without offsets
};

// A sequence is cut into chunks of this many steps from its own beginning; a state is kept at the start of each for the
// backward. 64 steps of 16 states are four channels' worth of input a channel: a quarter of one tensor in float32.
inline constexpr int64_t kChunk = 64;

// Slots for the states at the start of chunks: those of sequence i of a row begin at its offset / kChunk + i. An empty
// sequence has one too.
inline int64_t chunk_slots(const Sequences& s) {
  return s.offsets == nullptr ? s.batch * (s.steps / kChunk + 1) : s.steps / kChunk + s.count;
}

}  // namespace lcore
