// What happens to a row of scores between the two matrix products: soft cap, ALiBi, mask. Forward and backward share
// it, so both see the same numbers.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/attention/inputs.h"
#include "cpu/math.h"

namespace lcore::cpu::LCORE_ISA {

// Columns of a block of keys that a row may see, relative to the block.
struct Columns {
  int begin;
  int end;
  bool empty() const { return begin >= end; }
};

inline Columns visible_columns(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key_begin, int keys) {
  const KeyRange range = visible(p, s, s.position(row));
  return {static_cast<int>(std::clamp<int64_t>(range.begin - key_begin, 0, keys)),
          static_cast<int>(std::clamp<int64_t>(range.end - key_begin, 0, keys))};
}

// The vectors of a row that hold a visible column, as [first, last) in elements.
template <class T>
inline Columns vector_span(Columns columns) {
  constexpr int kLane = kLanes<T>;
  return {columns.begin / kLane * kLane, (columns.end + kLane - 1) / kLane * kLane};
}

// score <- softcap * tanh(score / softcap) - slope * |position - key|, then -inf outside the visible columns.
template <class T>
inline void finish_scores(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key_begin, Columns columns,
                          T* scores) {
  const Columns span = vector_span<T>(columns);
  if (p.softcap > 0) {
    const T cap = static_cast<T>(p.softcap);
    for (int c = span.begin; c < span.end; c += kLanes<T>) store(scores + c, cap * tanh(load(scores + c) / cap));
  }
  if (p.alibi_slopes != nullptr) {
    const T slope = p.alibi_slopes[s.batch * p.alibi_batch + s.head(row)];
    const int64_t distance = s.position(row) + s.k_len - s.q_len - key_begin;
    for (int c = columns.begin; c < columns.end; ++c) {
      scores[c] -= slope * std::abs(static_cast<T>(distance - c));
    }
  }
  std::fill(scores + span.begin, scores + columns.begin, -kInfinity<T>);
  std::fill(scores + columns.end, scores + span.end, -kInfinity<T>);
}

}  // namespace lcore::cpu::LCORE_ISA
