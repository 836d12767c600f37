// What happens to a row of scores between the two matrix products: soft cap, ALiBi, mask. Forward and backward share
// it, so both see the same numbers.
#pragma once

#include <algorithm>

#include "cpu/attention/sequence.h"
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

// slope * |position - key| for the vector of keys from `key` on.
template <class T>
inline Vec<T> alibi(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key) {
  const T slope = p.alibi_slopes[s.batch * p.alibi_batch + s.head(row)];
  const Vec<T> distance = static_cast<T>(s.position(row) + s.k_len - s.q_len - key) - iota<T>();
  return slope * (distance < T{0} ? -distance : distance);
}

// score <- softcap * tanh(score * scale / softcap) - slope * |position - key|, then -inf outside the visible columns.
template <class T>
inline void finish_scores(const AttentionParams& p, const Sequence& s, int64_t row, int64_t key_begin, Columns columns,
                          T scale, T* scores) {
  const Columns span = vector_span<T>(columns);
  const auto each = [&](const auto& fn) {
    for (int c = span.begin; c < span.end; c += kLanes<T>) store(scores + c, fn(load(scores + c), c));
  };
  if (scale != T{1}) each([&](Vec<T> score, int) { return score * scale; });
  if (p.softcap > 0) {
    const T cap = static_cast<T>(p.softcap);
    each([&](Vec<T> score, int) { return cap * tanh(score / cap); });
  }
  if (p.alibi_slopes != nullptr) {
    each([&](Vec<T> score, int c) { return score - alibi<T>(p, s, row, key_begin + c); });
  }
  std::fill(scores + span.begin, scores + columns.begin, -kInfinity<T>);
  std::fill(scores + columns.end, scores + span.end, -kInfinity<T>);
}

}  // namespace lcore::cpu::LCORE_ISA
