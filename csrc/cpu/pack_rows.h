// Rows of a tensor, of any element type and stride, as rows of B: packed into panels (gemm.h), or read in place. Row r
// of the source is step r of the depth (V, and K for dQ); in pairs (BF16Pairs) a step is two of them. What lies past
// the rows or past `dim` is zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/arithmetic.h"
#include "cpu/panels.h"
#include "cpu/rows.h"

namespace lcore::cpu::LCORE_ISA {

constexpr int div_up(int a, int b) { return (a + b - 1) / b; }

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
      for (int i = 0; i < 2; ++i) prefetch_ahead(in, src, r + i, rows, dim);
      for_each_vector(panels, depth, cols, (first + r) / 2, [&](In* pair, int c) {
        const Vec<In> low = load_bits(row, in.col_stride, c, dim);
        store(pair, both ? low | load_bits(row + in.row_stride, in.col_stride, c, dim) << 16 : low);
      });
    }
  } else {
    with_type(in.data, in.type, [&](const auto* src) {
      for (int r = 0; r < rows; ++r) {
        const auto* row = src + r * in.row_stride;
        prefetch_ahead(in, src, r, rows, dim);
        for_each_vector(panels, depth, cols, first + r,
                        [&](In* place, int c) { store(place, load_columns<In>(row, in.col_stride, c, dim)); });
      }
    });
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
