// A head's state between the tensors of all states and the packed panels (gemm.h) that it lives in.
#pragma once

#include "cpu/linear_attention/item.h"

namespace lcore::cpu::LCORE_ISA {

// The state before the first token of an item, in panels.
template <class T>
void first_state(const LinearAttentionParams& p, const LinearItem& item, T* state) {
  const int cols = round_up_lanes<T>(state_columns(p, item.columns));
  if (p.initial_state == nullptr) {
    std::fill(state, state + int64_t{p.key_dim} * cols, T{0});
    return;
  }
  const int64_t key = (item.sequence * p.heads + item.head) * p.key_dim;
  const T* columns = static_cast<const T*>(p.initial_state) + key * p.value_dim + item.column;
  pack_rows<Widened<T>>({columns, kTypeOf<T>, p.value_dim, 1}, p.key_dim, item.columns, state, p.key_dim, cols);
  if (p.initial_norm == nullptr) return;
  set_column(static_cast<const T*>(p.initial_norm) + key, state, p.key_dim, cols, item.columns);
}

// A state in panels to its place in `states`, (sequences, heads, key_dim, value_dim), and `norms`.
template <class T>
void store_state(const LinearAttentionParams& p, const LinearItem& item, T* state, T* row, void* states, void* norms) {
  const int columns = state_columns(p, item.columns);
  const int64_t key = (item.sequence * p.heads + item.head) * p.key_dim;
  for (int d = 0; d < p.key_dim; ++d) {
    row_from_panels(state, p.key_dim, round_up_lanes<T>(columns), d, row);
    std::copy(row, row + item.columns, static_cast<T*>(states) + (key + d) * p.value_dim + item.column);
    if (columns > item.columns && item.column == 0) static_cast<T*>(norms)[key + d] = row[item.columns];
  }
}

}  // namespace lcore::cpu::LCORE_ISA
