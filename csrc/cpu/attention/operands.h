// How rows of a sequence come into the operands of the matrix products: queries row-major as A, keys and values as
// packed panels of B, wherever they lie; q and K are rotated there where K is stored before RoPE.
#pragma once

#include <cstdint>

#include "cpu/attention/key_rotation.h"
#include "cpu/attention/runs.h"
#include "cpu/attention/unpack.h"
#include "cpu/pack_columns.h"

namespace lcore::cpu::LCORE_ISA {

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

// Keys [begin, begin + keys) of K as columns of panels over head_dim; `begin` is a multiple of a vector's lanes where
// keys are coded or rotated.
template <class M>
inline void pack_keys_as_columns(const AttentionParams& p, bool value, const Sequence& s, int64_t begin, int keys,
                                 typename M::In* panels, float* expanded = nullptr,
                                 const KeyRotation<M>* rotation = nullptr) {
  const int dim = value ? p.head_dim_v : p.head_dim;
  const int cols = round_up_lanes<typename M::In>(keys);
  const auto pack_runs = [&](int first, int last) {
    for_each_run(p, value, s, begin + first, last - first, expanded, [&](const RowsIn& rows, int offset, int count) {
      pack_columns<M>(rows, count, dim, panels, cols, first + offset);
    });
  };
  if constexpr (std::is_same_v<M, Widened<float>>) {
    const Steps codes = integer_keys(p, s, value, begin, keys);
    pack_runs(0, codes.begin);
    unpack_keys(p, s, begin, codes, panels, cols);
    pack_runs(codes.end, keys);
  } else {
    pack_runs(0, keys);
  }
  if (rotation != nullptr) rotation->rotate_keys(s, panels, cols, begin);
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
