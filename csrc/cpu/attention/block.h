// Query rows of one kv head against a block of keys, and what the mask lets through between them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention/sequence.h"
#include "cpu/gemm.h"

namespace lcore::cpu::LCORE_ISA {

struct Block {
  const Sequence& s;
  int64_t row;
  int rows;
  int64_t key;
  int keys;
  bool whole;  // every row sees every key

  // With `narrow`, only those of the rows that see any of the keys; there may be none.
  Block(const AttentionParams& p, const Sequence& sequence, int64_t first_row, int row_count, int64_t first_key,
        int key_count, bool narrow = false)
      : s(sequence), row(first_row), rows(row_count), key(first_key), keys(key_count) {
    if (narrow) {
      const Steps seeing = rows_seeing(p, 0, keys);
      row += seeing.begin;
      rows = seeing.end - seeing.begin;
    }
    whole = rows > 0 && visible(p, s, s.position(row)).end >= key + keys &&
            visible(p, s, s.position(row + rows - 1)).begin <= key;
  }

  // Rows, from the block's first, that see any of its keys [begin, begin + count).
  Steps rows_seeing(const AttentionParams& p, int begin, int count) const {
    const RowRange seeing = seeing_rows(p, s, key + begin, count);
    const int first = static_cast<int>(std::clamp<int64_t>(seeing.begin - row, 0, rows));
    return {first, static_cast<int>(std::clamp<int64_t>(seeing.end - row, first, rows))};
  }
  // Keys, from the block's first, that any of its rows [begin, begin + count) sees.
  Steps keys_seen(const AttentionParams& p, int begin, int count) const {
    const KeyRange seen = visible(p, s, row + begin, count);
    const int first = static_cast<int>(std::clamp<int64_t>(seen.begin - key, 0, keys));
    return {first, static_cast<int>(std::clamp<int64_t>(seen.end - key, first, keys))};
  }
};

// c (rows x keys) = A B^T, B's keys as the columns of packed panels over `depth` steps; where the mask cuts the block,
// each panel only for the rows that see any of it.
template <class M>
inline void multiply_by_columns(const AttentionParams& p, const Block& block, const MatrixA<typename M::In>& a,
                                const typename M::In* panels, int depth, typename M::Out* c, int ld_c) {
  using In = typename M::In;
  const int cols = (block.keys + kLanes<In> - 1) / kLanes<In> * kLanes<In>;
  const int step = block.whole ? cols : kPanel<In>;
  for (int j = 0; j < cols; j += step) {
    const Steps rows = block.whole ? Steps{0, block.rows} : block.rows_seeing(p, j, std::min(step, block.keys - j));
    gemm<M, Accumulate::kOverwrite>({a.data + rows.begin * a.row, a.row, a.col}, panels + int64_t{j} * depth, depth,
                                    {0, depth}, c + int64_t{rows.begin} * ld_c + j, ld_c, rows.end - rows.begin,
                                    std::min(step, cols - j));
  }
}

}  // namespace lcore::cpu::LCORE_ISA
