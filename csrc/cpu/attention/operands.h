// How rows of a sequence come into the operands of the matrix products: queries row-major as A, keys and values as
// packed panels of B, wherever they lie; q and K are rotated there where K is stored before RoPE.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention/expand.h"
#include "cpu/attention/key_rotation.h"
#include "cpu/attention/sequence.h"
#include "cpu/pack_columns.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// Whether q, k and v are bfloat16 wherever they lie, so that products may run on pairs.
inline bool in_bfloat16(const AttentionParams& p) {
  const auto is = [](DType type) { return type == DType::kBFloat16; };
  const auto stored = [](PageFormat format) { return format == PageFormat::kBFloat16; };
  return is(p.type) && (p.pages == nullptr || (stored(p.pages->k_format) && stored(p.pages->v_format)));
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
    const int32_t* ids = pages.page_table + slot * pages.table_width + pages.column(page);
    if (page < pages.plain_pages) {
      const int64_t tokens = pages.page_size / pages.parts, in_part = in_page % tokens;
      const uint8_t* part = pages.pool + ids[in_page / tokens] * pages.page_bytes + (value ? pages.plain_v_offset : 0);
      return {at(part, p.type, in_part * dim, dim, 1), std::min(tokens - in_part, count)};
    }
    const int64_t id = *ids;
    const uint8_t* codes = pages.pool + id * pages.page_bytes + (value ? pages.v_offset : 0);
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

// Row-major tile[r], ld values of M::In: rows [row, row + rows) of a query-shaped tensor; widened ones times scale.
template <class M>
inline void load_query_tile(const Strided& x, DType type, const Sequence& s, int64_t row, int rows, int cols,
                            typename M::Out scale, typename M::In* tile, int ld,
                            const KeyRotation<M>* rotation = nullptr) {
  for_each_query_run(x, type, s, row, rows, [&](const RowsIn& run, int offset, int count) {
    with_type(run.data, type, [&](const auto* src) {
      for (int r = 0; r < count; ++r) {
        typename M::In* dst = tile + int64_t{offset + r} * ld;
        const auto* from = src + r * run.row_stride;
        prefetch_ahead(run, src, r, count, cols);
        if constexpr (M::kPair == 2) {
          const auto* bits = reinterpret_cast<const BFloat16*>(from);
          for (int i = 0; i < div_up(cols, 2); ++i) dst[i] = step_of<M>(bits, run.col_stride, i, cols);
        } else {
          load_row(from, run.col_stride, dst, cols, scale);
        }
      }
    });
  });
  if (rotation != nullptr) rotation->rotate_queries(s, row, rows, tile, ld);
}

// The same rows as steps of panels over their columns.
template <class M>
inline void pack_query_rows(const Strided& x, DType type, const Sequence& s, int64_t row, int rows, int cols,
                            typename M::In* panels) {
  for_each_query_run(x, type, s, row, rows, [&](const RowsIn& run, int offset, int count) {
    pack_rows<M>(run, count, cols, panels, div_up(rows, M::kPair), round_up_lanes<typename M::Out>(cols), offset);
  });
}

// Keys [begin, begin + keys) of K as columns of panels over head_dim.
template <class M>
inline void pack_keys_as_columns(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                                 typename M::In* panels, float* expanded = nullptr,
                                 const KeyRotation<M>* rotation = nullptr) {
  const int dim = value ? p.head_dim_v : p.head_dim;
  const int cols = round_up_lanes<typename M::In>(keys);
  for_each_run(p, value, s, begin, keys, expanded, [&](const RowsIn& rows, int offset, int count) {
    pack_columns<M>(rows, count, dim, panels, cols, offset);
  });
  if (rotation != nullptr) rotation->rotate_keys(panels, cols, begin);
}

// Keys [begin, begin + keys) of K or V as steps of panels over its columns; an odd last key is paired with zeros.
template <class M>
inline void pack_keys_as_rows(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                              typename M::In* panels, float* expanded = nullptr) {
  const int dim = value ? p.head_dim_v : p.head_dim;
  for_each_run(p, value, s, begin, keys, expanded, [&](const RowsIn& rows, int offset, int count) {
    pack_rows<M>(rows, count, dim, panels, div_up(keys, M::kPair), round_up_lanes<typename M::In>(dim), offset);
  });
}

}  // namespace lcore::cpu::LCORE_ISA
