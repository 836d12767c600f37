// The chunks of a row's sequences, in order: what a recurrent kernel walks over.
#pragma once

#include <algorithm>
#include <vector>

#include "core/sequences.h"

namespace lcore::cpu::LCORE_ISA {

struct Chunk {
  int64_t begin;  // step of the row
  int steps;      // 0 only in an empty sequence
  int64_t sequence;
  int64_t slot;
  bool first;  // of its sequence
  bool last;
};

// Those of row 0. In row r sequences are counted from r, slots from r * chunks.size().
inline std::vector<Chunk> chunks_of(const Sequences& s, int64_t length = kChunk) {
  std::vector<Chunk> chunks;
  const int64_t count = s.offsets == nullptr ? 1 : s.count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = s.offsets == nullptr ? 0 : s.offsets[i];
    const int64_t end = s.offsets == nullptr ? s.steps : s.offsets[i + 1];
    int64_t at = begin;
    do {
      const int steps = static_cast<int>(std::min(length, end - at));
      chunks.push_back({at, steps, i, begin / length + i + (at - begin) / length, at == begin, at + steps == end});
      at += steps;
    } while (at < end);
  }
  return chunks;
}

inline int64_t slots_a_row(const Sequences& s) { return s.steps / kChunk + 1; }

}  // namespace lcore::cpu::LCORE_ISA
