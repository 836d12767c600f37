// Which rows and keys a sequence has, and which see which: dense, packed and paged inputs look alike from here on. A
// tile of query rows packs the query heads that share a kv head: row f of a sequence is position f / group, head
// kv_head * group + f % group.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/attention.h"

namespace lcore::cpu::LCORE_ISA {

struct Sequence {
  int64_t batch;
  int64_t kv_head;
  int64_t group;    // query heads a kv head
  int64_t q_begin;  // first row in the tensor's seq dimension
  int64_t q_len;
  int64_t k_begin;
  int64_t k_len;

  int64_t rows() const { return q_len * group; }
  int64_t position(int64_t row) const { return row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
};

inline Sequence sequence_of(const AttentionParams& p, int64_t batch, int64_t kv_head) {
  Sequence s{batch, kv_head, p.heads / p.kv_heads, 0, p.seq_q, 0, p.seq_k};
  if (p.cu_seqlens_q != nullptr) {
    s.q_begin = p.cu_seqlens_q[batch];
    s.q_len = p.cu_seqlens_q[batch + 1] - s.q_begin;
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_begin = p.cu_seqlens_k[batch];
    s.k_len = p.cu_seqlens_k[batch + 1] - s.k_begin;
  }
  if (p.q_lengths != nullptr) s.q_len = p.q_lengths[batch];
  if (p.pages != nullptr) s.k_len = p.pages->lengths[batch * p.kv_heads + kv_head];
  return s;
}

// Keys [begin, end) that query position i may see.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

inline KeyRange visible(const AttentionParams& p, const Sequence& s, int64_t position) {
  const int64_t at = position + s.k_len - s.q_len;
  return {std::clamp<int64_t>(at - p.window_left, 0, s.k_len),
          std::clamp<int64_t>(at + p.window_right + 1, 0, s.k_len)};
}

// Keys that any of the rows [row, row + rows) may see.
inline KeyRange visible(const AttentionParams& p, const Sequence& s, int64_t row, int64_t rows) {
  return {visible(p, s, s.position(row)).begin, visible(p, s, s.position(row + rows - 1)).end};
}

// Rows [begin, end) of a sequence that may see any of the keys [key, key + keys).
struct RowRange {
  int64_t begin;
  int64_t end;
};

inline RowRange seeing_rows(const AttentionParams& p, const Sequence& s, int64_t key, int64_t keys) {
  const int64_t shift = s.k_len - s.q_len;
  const int64_t first = std::clamp<int64_t>(key - p.window_right - shift, 0, s.q_len);
  const int64_t last = std::clamp<int64_t>(key + keys + p.window_left - shift, first, s.q_len);
  return {first * s.group, last * s.group};
}

}  // namespace lcore::cpu::LCORE_ISA
