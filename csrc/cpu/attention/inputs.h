// Where a sequence's rows and keys lie, and how they come into tiles: dense, packed and paged inputs look alike from
// here on. A tile of query rows packs the query heads that share a kv head: row f of a sequence is position f / group,
// head kv_head * group + f % group.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/attention.h"
#include "cpu/rows.h"

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

// tile[r] = rows [row, row + rows) of a query-shaped tensor, times scale.
template <class T>
inline void load_query_tile(const Strided& x, DType type, const Sequence& s, int64_t row, int rows, int cols, T scale,
                            T* tile, int ld) {
  with_type(x.data, type, [&](const auto* src) {
    for (int r = 0; r < rows; ++r) {
      T* dst = tile + int64_t{r} * ld;
      load_row(src + s.batch * x.batch + (s.q_begin + s.position(row + r)) * x.seq + s.head(row + r) * x.head, x.dim,
               dst, cols);
      std::fill(dst + cols, dst + ld, T{0});
      if (scale != T{1}) {
        for (int c = 0; c < ld; c += kLanes<T>) store(dst + c, load(dst + c) * scale);
      }
    }
  });
}

// Rows of K or V as runs of equal stride: fn(rows, offset of the run's first key from `begin`, keys in the run).
template <class Fn>
inline void for_each_run(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                         const Fn& fn) {
  if (p.pages == nullptr) {
    const Strided& x = value ? p.v : p.k;
    const int64_t offset = s.batch * x.batch + (s.k_begin + begin) * x.seq + s.kv_head * x.head;
    const auto* data = static_cast<const char*>(x.data) + offset * static_cast<int64_t>(size_of(p.type));
    return fn(RowsIn{data, p.type, x.seq, x.dim}, 0, keys);
  }
  const KvPages& pages = *p.pages;
  const int64_t dim = value ? p.head_dim_v : p.head_dim;
  const int64_t slot = s.batch * p.kv_heads + s.kv_head;
  const int64_t full = s.k_len / pages.page_size;
  for (int done = 0; done < keys;) {
    const int64_t key = begin + done;
    const int64_t page = key / pages.page_size;
    const int64_t in_page = key % pages.page_size;
    const int count = static_cast<int>(std::min<int64_t>(keys - done, pages.page_size - in_page));
    if (page < full) {
      const DType type = value ? pages.v_type : pages.k_type;
      const int64_t id = pages.page_table[slot * pages.table_width + page];
      const uint8_t* codes = pages.pool + id * pages.page_bytes + (value ? pages.v_offset : 0);
      fn(RowsIn{codes + in_page * dim * static_cast<int64_t>(size_of(type)), type, dim, 1}, done, count);
    } else {
      const auto* tail = static_cast<const uint8_t*>(value ? pages.tail_v : pages.tail_k);
      const int64_t offset = (slot * pages.page_size + in_page) * dim;
      fn(RowsIn{tail + offset * static_cast<int64_t>(size_of(p.type)), p.type, dim, 1}, done, count);
    }
    done += count;
  }
}

// tile = keys [begin, begin + keys) of K or V, row-major.
template <class T>
inline void load_keys(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys, T* tile,
                      int ld) {
  const int dim = value ? p.head_dim_v : p.head_dim;
  for_each_run(p, value, s, begin, keys, [&](const RowsIn& rows, int offset, int count) {
    load_rows(rows, count, dim, tile + int64_t{offset} * ld, ld);
  });
}

// tile[c][key] = K[begin + key][c]; columns [keys, ld) are zero. `staging` holds `keys` rows of ld_staging.
template <class T>
inline void load_keys_transposed(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                                 T* staging, int ld_staging, T* tile, int ld) {
  const int dim = value ? p.head_dim_v : p.head_dim;
  load_keys(p, value, s, begin, keys, staging, ld_staging);
  transpose(staging, ld_staging, keys, dim, tile, ld);
  if (keys < ld) {
    for (int c = 0; c < dim; ++c) std::fill(tile + int64_t{c} * ld + keys, tile + int64_t{c + 1} * ld, T{0});
  }
}

}  // namespace lcore::cpu::LCORE_ISA
