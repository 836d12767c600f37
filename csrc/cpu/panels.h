// Where columns and steps lie in packed panels (gemm.h): the layout, for those who fill or read them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"

namespace lcore::cpu::LCORE_ISA {

// Where the vector of columns c.. lies in panels of `depth` steps and `cols` columns: at data + step * width.
template <class In>
struct PanelColumns {
  In* data;
  int width;
};
template <class In>
inline PanelColumns<In> in_panels(In* panels, int64_t depth, int cols, int c) {
  const int first = c / kPanel<In> * kPanel<In>;
  return {panels + first * depth + (c - first), std::min(kPanel<In>, cols - first)};
}

// Calls fn with the number of vectors of a panel, 1 to 4, as a constant: addresses become offsets.
template <class Fn>
inline void with_vectors(int vectors, const Fn& fn) {
  switch (vectors) {
    case 1:
      return fn.template operator()<1>();
    case 2:
      return fn.template operator()<2>();
    case 3:
      return fn.template operator()<3>();
    default:
      return fn.template operator()<4>();
  }
}

// Calls fn(columns' place in panels, c) for every vector of columns of a step, panel after panel.
template <class In, class Fn>
inline void for_each_vector(In* panels, int64_t depth, int cols, int step, const Fn& fn) {
  constexpr int kLane = kLanes<In>;
  int c = 0;
  In* panel = panels + int64_t{step} * kPanel<In>;
  for (; c + kPanel<In> <= cols; c += kPanel<In>) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors<In>; ++j) fn(panel + j * kLane, c + j * kLane);
    panel += depth * kPanel<In>;
  }
  for (; c < cols; c += kLane) {
    const PanelColumns<In> place = in_panels(panels, depth, cols, c);
    fn(place.data + int64_t{step} * place.width, c);
  }
}

// One row of what a panel of `width` columns holds, a vector of it: in pairs of bfloat16 it is half of each element.
template <class M>
inline Vec<typename M::Out> load_panel_row(const typename M::In* panel, int width, int row) {
  const Vec<typename M::In> step = load(panel + int64_t{row / M::kPair} * width);
  if constexpr (M::kPair == 2) {
    return reinterpret_cast<Vec<float>>(row % 2 == 0 ? step << 16 : step & 0xffff0000u);
  } else {
    return step;
  }
}
template <class M>
inline void store_panel_row(typename M::In* panel, int width, int row, Vec<typename M::Out> value) {
  typename M::In* step = panel + int64_t{row / M::kPair} * width;
  if constexpr (M::kPair == 2) {
    const Vec<uint32_t> bits = round_bits(value);
    store(step, row % 2 == 0 ? (load(step) & 0xffff0000u) | bits >> 16 : (load(step) & 0xffffu) | bits);
  } else {
    store(step, value);
  }
}

}  // namespace lcore::cpu::LCORE_ISA
