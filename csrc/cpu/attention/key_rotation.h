// Keys that a cache stores before RoPE, rotated in the panels that they are packed into: a vector of a panel holds one
// channel of keys that follow each other in the text. R(p) = R(b) R(p - b) with b the multiple of kSteps below p: R(b)
// is formed exactly, once for kSteps keys; R(0), R(1), ... stand in a table, made once a call, whose vectors run over
// the keys too. So a pair of vectors takes eight multiply-adds, nothing is kept that grows with the keys, and the bits
// of a key do not depend on which keys are packed with it. Queries are rotated once they are loaded, to the positions
// of their own tokens.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/attention/rotation_table.h"
#include "cpu/attention/sequence.h"
#include "cpu/panels.h"

namespace lcore::cpu::LCORE_ISA {

// What a worker rotates with.
template <class M>
class KeyRotation {
  using T = typename M::Out;
  using In = typename M::In;
  using Table = RotationTable<M>;

 public:
  static KeyRotation lay_out(const Table& table, int dim, Arena& arena) {
    T* turn = arena.take<T>(2 * table.turns.padded());
    T* row = arena.take<T>(round_up_lanes<T>(dim));
    BFloat16* bits = arena.take<BFloat16>(dim);
    return {&table, dim, turn, row, bits};
  }

  // The keys of a sequence from `begin` on, a multiple of a vector's lanes, in panels of `cols` columns.
  void rotate_keys(const Sequence& s, In* panels, int cols, int64_t begin) const {
    const int depth = (dim_ + M::kPair - 1) / M::kPair;
    for (int c = 0; c < cols;) {
      const PanelColumns<In> panel = in_panels(panels, depth, cols, c);
      const int64_t position = table_->position(s, begin + c), step = position % Table::kSteps;
      // Columns of this panel whose positions follow each other up to the next multiple of kSteps.
      int64_t count = std::min<int64_t>(panel.width - c % kPanel<In>, Table::kSteps - step);
      if (table_->pages->places != nullptr) {
        const int64_t size = table_->pages->page_size;
        count = std::min(count, size - (begin + c) % size);
      }
      turn_to(position - step);
      with_vectors(static_cast<int>(count / kLanes<In>), [&]<int kVectors>() {
        constexpr int kWidth = kVectors * kLanes<In>;
        if (panel.width == kWidth) return rotate_columns<kVectors>(panel.data, kWidth, step);
        rotate_columns<kVectors>(panel.data, panel.width, step);
      });
      c += static_cast<int>(count);
    }
  }

  // Rows [row, row + rows) of a sequence's queries, in a tile of leading dimension ld.
  void rotate_queries(const Sequence& s, int64_t row, int rows, In* tile, int ld) const {
    for (int r = 0; r < rows; ++r) {
      turn_to(table_->position(s, s.position(row + r) + s.k_len - s.q_len));
      rotate_row(tile + int64_t{r} * ld);
    }
  }

 private:
  KeyRotation(const Table* table, int dim, T* turn, T* row, BFloat16* bits)
      : table_(table), dim_(dim), turn_(turn), row_(row), bits_(bits) {}

  void turn_to(int64_t position) const {
    if (turned_ == position) return;
    turned_ = position;
    const T scale = static_cast<T>(table_->rotation.attention_scaling);
    table_->turns.fill(static_cast<double>(position), scale, T{1}, turn_, turn_ + table_->turns.padded());
  }

  // Vectors of columns in a panel of `width` of them; the first column is `step` positions behind that of turn_.
  template <int kVectors>
  [[gnu::always_inline]] void rotate_columns(In* from, int width, int64_t step) const {
    const Rotation& rotation = table_->rotation;
    const T* steps = table_->steps.data() + step;
    for (int m = 0; m < rotation.half; ++m, steps += 2 * Table::kSteps) {
      const int first = rotation.interleaved ? 2 * m : m;
      const int second = rotation.interleaved ? first + 1 : m + rotation.half;
      const T base_cos = turn_[m], base_sin = turn_[table_->turns.padded() + m];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec<T> step_cos = load(steps + j * kLanes<T>), step_sin = load(steps + Table::kSteps + j * kLanes<T>);
        const Vec<T> cosine = base_cos * step_cos - base_sin * step_sin;
        const Vec<T> sine = base_sin * step_cos + base_cos * step_sin;
        In* columns = from + j * kLanes<In>;
        const Vec<T> x = load_panel_row<M>(columns, width, first), y = load_panel_row<M>(columns, width, second);
        store_panel_row<M>(columns, width, first, x * cosine - y * sine);
        store_panel_row<M>(columns, width, second, y * cosine + x * sine);
      }
    }
  }

  void rotate_row(In* row) const {
    const T* sine = turn_ + table_->turns.padded();
    if constexpr (M::kPair == 2) {
      std::memcpy(bits_, row, sizeof(BFloat16) * dim_);
      load_row(bits_, 1, row_, dim_);
      rotate(table_->rotation, turn_, sine, row_);
      store_row(row_, dim_, bits_, DType::kBFloat16);
      std::memcpy(row, bits_, sizeof(BFloat16) * dim_);
    } else {
      rotate(table_->rotation, turn_, sine, row);
    }
  }

  const Table* table_;
  int dim_;
  T* turn_;  // cosines and sines of a position
  T* row_;
  BFloat16* bits_;
  mutable int64_t turned_ = std::numeric_limits<int64_t>::min();  // the position of turn_
};

}  // namespace lcore::cpu::LCORE_ISA
