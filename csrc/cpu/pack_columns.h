// Rows of a tensor as columns of B: the transpose, packed into panels (K for the scores). Squares of vectors are
// transposed in registers, bfloat16 rows in pairs; what makes no square goes by element.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/pack_rows.h"
#include "cpu/transpose.h"

namespace lcore::cpu::LCORE_ISA {

// One element, or one pair, of a row.
template <class M, class Element>
inline typename M::In step_of(const Element* row, int64_t stride, int step, int dim) {
  if constexpr (M::kPair == 2) {
    const uint32_t low = row[2 * step * stride].bits;
    return 2 * step + 1 < dim ? low | uint32_t{row[(2 * step + 1) * stride].bits} << 16 : low;
  } else {
    return static_cast<typename M::In>(widen(row[step * stride]));
  }
}

// A square of kLanes rows from `rows` on, steps s.., into the columns at `out`. bfloat16 rows are transposed in pairs,
// so that a square gives two widened steps for every pair.
template <class M, int kWidth, class Element>
inline void pack_square(const Element* rows, int64_t row_stride, int s, typename M::In* out) {
  using In = typename M::In;
  constexpr int kLane = kLanes<In>;
  In* to = out + int64_t{s} * kWidth;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    Vec<uint32_t> pairs[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) {
      const Element* row = rows + i * row_stride + s * M::kPair;
      std::memcpy(&pairs[i], row, sizeof(pairs[i]));
    }
    transpose_square<uint32_t>(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) {
      if constexpr (M::kPair == 2) {
        store(to + i * kWidth, pairs[i]);
      } else {
        store(to + 2 * i * kWidth, reinterpret_cast<Vec<float>>(pairs[i] << 16));
        store(to + (2 * i + 1) * kWidth, reinterpret_cast<Vec<float>>(pairs[i] & 0xffff0000u));
      }
    }
  } else {
    Vec<In> v[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) {
      const Element* row = rows + i * row_stride + s;
      v[i] = load_as(row, In{});
    }
    transpose_square<In>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) store(to + i * kWidth, v[i]);
  }
}

template <class M, class Element>
inline constexpr bool kHasSquares =
    std::is_same_v<Element, BFloat16> ? sizeof(typename M::In) == 4 : kLoadsVectors<typename M::In, Element>;

// Rows [0, rows) of `in` become columns from `first` on of panels over the steps of `dim`.
template <class M>
inline void pack_columns(const RowsIn& in, int rows, int dim, typename M::In* panels, int cols, int first = 0) {
  using In = typename M::In;
  constexpr int kLane = kLanes<In>;
  const int depth = div_up(dim, M::kPair);
  const auto pack = [&](const auto* src) {
    using Element = std::remove_cvref_t<decltype(*src)>;
    // Steps that a square covers; what is left of the depth, and rows that make no square, go by element.
    constexpr int kSquare = std::is_same_v<Element, BFloat16> && M::kPair == 1 ? 2 * kLane : kLane;
    for (int r = 0; r < rows;) {
      const bool square = (first + r) % kLane == 0 && r + kLane <= rows && in.col_stride == 1;
      const int count = square ? kLane : 1;
      const Element* block = src + r * in.row_stride;
      for (int i = 0; i < count; ++i) prefetch_ahead(in, src, r + i, rows, dim);
      const PanelColumns<In> out = in_panels(panels, depth, cols, first + r);
      int s = 0;
      if constexpr (kHasSquares<M, Element>) {
        if (square) {
          const auto squares = [&]<int kVectors>() {
            for (; s + kSquare <= dim / M::kPair; s += kSquare) {
              pack_square<M, kVectors * kLane>(block, in.row_stride, s, out.data);
            }
          };
          with_vectors(out.width / kLane, squares);
        }
      }
      for (; s < depth; ++s) {
        for (int i = 0; i < count; ++i) {
          out.data[s * out.width + i] = step_of<M>(block + i * in.row_stride, in.col_stride, s, dim);
        }
      }
      r += count;
    }
  };
  if constexpr (M::kPair == 2) {
    pack(static_cast<const BFloat16*>(in.data));
  } else {
    with_type(in.data, in.type, pack);
  }
}

}  // namespace lcore::cpu::LCORE_ISA
