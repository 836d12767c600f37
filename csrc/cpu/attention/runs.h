// Where the rows of q, k and v lie, as runs of equal stride: in tensors, in pages, in a page's parts, in the tail. Rows
// of coded pages are expanded where something asks for rows of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention/expand.h"
#include "cpu/attention/sequence.h"
#include "cpu/rows.h"

namespace lcore::cpu::LCORE_ISA {

// Whether q, k and v are bfloat16 wherever they lie, so that products may run on pairs.
inline bool in_bfloat16(const AttentionParams& p) {
  const auto is = [](DType type) { return type == DType::kBFloat16; };
  const auto stored = [](PageFormat format) { return format == PageFormat::kBFloat16; };
  return is(p.type) && (p.pages == nullptr || (stored(p.pages->k_format) && stored(p.pages->v_format)));
}

// The page that holds key `key` of a slot: its K, or its V.
inline const uint8_t* page_of(const AttentionParams& p, const Sequence& s, bool value, int64_t key) {
  const KvPages& pages = *p.pages;
  const int64_t slot = s.batch * p.kv_heads + s.kv_head;
  const int64_t id = pages.page_table[slot * pages.table_width + pages.column(key / pages.page_size)];
  return pages.pool + id * pages.page_bytes + (value ? pages.v_offset : 0);
}

// The row of key `key`, and how many keys from it on lie at equal distances.
struct Run {
  RowsIn rows;
  int64_t count;
};

// Rows of a coded page are expanded into `expanded`, of which there is a block's worth where any page is coded.
inline Run run_at(const AttentionParams& p, bool value, const Sequence& s, int64_t key, int64_t most = 0,
                  float* expanded = nullptr) {
  const auto at = [](const void* data, DType type, int64_t index, int64_t row, int64_t col) {
    const auto size = static_cast<int64_t>(size_of(type));
    return RowsIn{static_cast<const char*>(data) + index * size, type, row, col};
  };
  if (p.pages == nullptr) {
    const Strided& x = value ? p.v : p.k;
    const int64_t index = s.batch * x.batch + (s.k_begin + key) * x.seq + s.kv_head * x.head;
    return {at(x.data, p.type, index, x.seq, x.dim), s.k_len - key};
  }
  const KvPages& pages = *p.pages;
  const int64_t dim = value ? p.head_dim_v : p.head_dim;
  const int64_t slot = s.batch * p.kv_heads + s.kv_head;
  const int64_t page = key / pages.page_size, in_page = key % pages.page_size;
  const int64_t count = std::min(pages.page_size - in_page, s.k_len - key);
  if (page < s.k_len / pages.page_size) {
    if (page < pages.plain_pages) {
      const int32_t* ids = pages.page_table + slot * pages.table_width + pages.column(page);
      const int64_t tokens = pages.page_size / pages.parts, in_part = in_page % tokens;
      const uint8_t* part = pages.pool + ids[in_page / tokens] * pages.page_bytes + (value ? pages.plain_v_offset : 0);
      return {at(part, p.type, in_part * dim, dim, 1), std::min(tokens - in_part, count)};
    }
    const uint8_t* codes = page_of(p, s, value, key);
    const PageFormat format = pages.format(value);
    if (is_plain(format)) return {at(codes, plain_type(format), in_page * dim, dim, 1), count};
    const int rows = static_cast<int>(std::min(count, most));
    expand_rows(format, value, codes, pages.page_size, static_cast<int>(dim), in_page, rows, expanded);
    return {at(expanded, DType::kFloat32, 0, dim, 1), rows};
  }
  const void* tail = value ? pages.tail_v : pages.tail_k;
  return {at(tail, p.type, (slot * pages.page_size + in_page) * dim, dim, 1), count};
}

// Rows of K or V as runs of equal stride: fn(rows, offset of the run's first key from `begin`, keys in the run).
template <class Fn>
inline void for_each_run(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                         float* expanded, const Fn& fn) {
  const bool plain = p.pages == nullptr || is_plain(p.pages->format(value));
  for (int done = 0; done < keys;) {
    Run run = run_at(p, value, s, begin + done, keys - done, expanded);
    const int count = static_cast<int>(std::min<int64_t>(keys - done, run.count));
    if (plain && begin + done + count < s.k_len) run.rows.next = run_at(p, value, s, begin + done + count).rows.data;
    fn(run.rows, done, count);
    done += count;
  }
}

// Rows [row, row + rows) of a query-shaped tensor as runs of equal stride: fn(rows, offset of the run from `row`,
// count).
template <class Fn>
inline void for_each_query_run(const Strided& x, DType type, const Sequence& s, int64_t row, int rows, const Fn& fn) {
  const auto size = static_cast<int64_t>(size_of(type));
  for (int done = 0; done < rows;) {
    const int64_t at = row + done;
    const int64_t index = s.batch * x.batch + (s.q_begin + s.position(at)) * x.seq + s.head(at) * x.head;
    const int64_t left =
        s.group == 1 ? rows : s.group - at % s.group;  // heads of one position, or positions of one head
    const int count = static_cast<int>(std::min<int64_t>(rows - done, left));
    fn(RowsIn{static_cast<const char*>(x.data) + index * size, type, s.group == 1 ? x.seq : x.head, x.dim}, done,
       count);
    done += count;
  }
}

}  // namespace lcore::cpu::LCORE_ISA
