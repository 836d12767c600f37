// Rows of a tensor, of any element type and stride, as the B of a matrix product: packed into panels (gemm.h).
//   pack_rows: row r of the source is step r of the depth, its columns are B's columns (V, and K for dQ).
//   pack_columns: the transpose; row r is column r of B (K for the scores).
// In pairs (BF16Pairs) a step is two neighbours along the depth. What lies past the rows or past `dim` is zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/arithmetic.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

namespace lcore::cpu::LCORE_ISA {

constexpr int div_up(int a, int b) { return (a + b - 1) / b; }

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

// Calls fn with the number of vectors of a panel, 1 to kTileVectors, as a constant: addresses become offsets.
template <class Fn>
inline void with_vectors(int vectors, const Fn& fn) {
  switch (vectors) {
    case 1:
      return fn.template operator()<1>();
    case 2:
      return fn.template operator()<2>();
    case 3:
      return fn.template operator()<std::min(3, kTileVectors)>();
    default:
      return fn.template operator()<kTileVectors>();
  }
}

// A vector of source elements as numbers of T; only where they are contiguous.
inline Vec<float> load_as(const float* p, float) { return load(p); }
inline Vec<float> load_as(const BFloat16* p, float) { return load_float(p); }
inline Vec<float> load_as(const Half* p, float) { return load_float(p); }
inline Vec<double> load_as(const double* p, double) { return load(p); }

template <class T, class Element>
inline constexpr bool kLoadsVectors = std::is_same_v<T, double> == std::is_same_v<Element, double>;

// Columns c.. of a row as a vector, zero from `dim` on.
template <class T, class Element>
inline Vec<T> load_columns(const Element* row, int64_t stride, int c, int dim) {
  if constexpr (kLoadsVectors<T, Element>) {
    if (stride == 1 && c + kLanes<T> <= dim) return load_as(row + c, T{});
  }
  Vec<T> v{};
  for (int i = 0; i < std::min(kLanes<T>, dim - c); ++i) v[i] = static_cast<T>(widen(row[(c + i) * stride]));
  return v;
}

// Columns c.. of a row of bfloat16 as bits in 32-bit lanes, zero from `dim` on.
inline Vec<uint32_t> load_bits(const BFloat16* row, int64_t stride, int c, int dim) {
  if (stride == 1 && c + kLanes<uint32_t> <= dim) {
    return widen_bits(load_half_bits(row + c));
  }
  Vec<uint32_t> v{};
  for (int i = 0; i < std::min(kLanes<uint32_t>, dim - c); ++i) v[i] = row[(c + i) * stride].bits;
  return v;
}

// Calls fn(columns' place in panels, c) for every vector of columns of a step, panel after panel.
template <class In, class Fn>
inline void for_each_vector(In* panels, int64_t depth, int cols, int step, const Fn& fn) {
  constexpr int kLane = kLanes<In>;
  int c = 0;
  In* panel = panels + int64_t{step} * kPanel<In>;
  for (; c + kPanel<In> <= cols; c += kPanel<In>) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) fn(panel + j * kLane, c + j * kLane);
    panel += depth * kPanel<In>;
  }
  for (; c < cols; c += kLane) {
    const PanelColumns<In> place = in_panels(panels, depth, cols, c);
    fn(place.data + int64_t{step} * place.width, c);
  }
}

// Rows [0, rows) of `in` are rows `first`.. of what fills the depth of panels of `depth` steps; runs come in order.
template <class M>
inline void pack_rows(const RowsIn& in, int rows, int dim, typename M::In* panels, int depth, int cols, int first = 0) {
  using In = typename M::In;
  if constexpr (M::kPair == 2) {
    const auto* src = static_cast<const BFloat16*>(in.data);
    int r = 0;
    if (first % 2 != 0) {  // the run before ended with the lower half of this pair, beside a zero
      for_each_vector(panels, depth, cols, first / 2,
                      [&](In* pair, int c) { store(pair, load(pair) | load_bits(src, in.col_stride, c, dim) << 16); });
      r = 1;
    }
    for (; r < rows; r += 2) {
      const BFloat16* row = src + r * in.row_stride;
      const bool both = r + 1 < rows;
      for_each_vector(panels, depth, cols, (first + r) / 2, [&](In* pair, int c) {
        const Vec<In> low = load_bits(row, in.col_stride, c, dim);
        store(pair, both ? low | load_bits(row + in.row_stride, in.col_stride, c, dim) << 16 : low);
      });
    }
  } else {
    with_type(in.data, in.type, [&](const auto* src) {
      for (int r = 0; r < rows; ++r) {
        const auto* row = src + r * in.row_stride;
        if (r + kRowsAhead < rows) prefetch_row(row + kRowsAhead * in.row_stride, dim);
        for_each_vector(panels, depth, cols, first + r,
                        [&](In* place, int c) { store(place, load_columns<In>(row, in.col_stride, c, dim)); });
      }
    });
  }
}

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

// Rows of a tensor as B in place: contiguous columns, one row a step (two in pairs). Columns past the row are not safe.
template <class M, class Element>
struct RowsInPlace {
  const Element* data;
  int64_t stride;
  Vec<typename M::In> operator()(int64_t k, int j) const {
    using In = typename M::In;
    if constexpr (M::kPair == 2) {
      const Element* row = data + 2 * k * stride + j * kLanes<In>;
      return widen_bits(load_half_bits(row)) | widen_bits(load_half_bits(row + stride)) << 16;
    } else {
      return load_as(data + k * stride + j * kLanes<In>, In{});
    }
  }
};

}  // namespace lcore::cpu::LCORE_ISA
