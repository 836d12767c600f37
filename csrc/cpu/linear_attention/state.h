// A head's state between the tensors of all states and the packed panels (gemm.h) that it lives in.
#pragma once

#include "cpu/linear_attention/item.h"

namespace lcore::cpu::LCORE_ISA {

// The state before the first token of an item, in panels.
template <class T>
void first_state(const LinearAttentionParams& p, const LinearItem& item, T* state) {
  const int cols = round_up_lanes<T>(item.columns);
  if (p.initial_state == nullptr) {
    std::fill(state, state + int64_t{p.key_dim} * cols, T{0});
    return;
  }
  const int64_t index = (item.sequence * p.heads + item.head) * p.key_dim * p.value_dim + item.column;
  state_to_panels(static_cast<const T*>(p.initial_state) + index, p.value_dim, p.key_dim, item.columns, state);
}

// A state in panels to its place in `states`, (sequences, heads, key_dim, value_dim).
template <class T>
void store_state(const LinearAttentionParams& p, const LinearItem& item, T* state, T* row, void* states) {
  const int64_t index = (item.sequence * p.heads + item.head) * p.key_dim * p.value_dim + item.column;
  for (int d = 0; d < p.key_dim; ++d) {
    row_from_panels(state, p.key_dim, round_up_lanes<T>(item.columns), d, row);
    std::copy(row, row + item.columns, static_cast<T*>(states) + index + int64_t{d} * p.value_dim);
  }
}

}  // namespace lcore::cpu::LCORE_ISA
