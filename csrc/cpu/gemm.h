// The one matrix product of the attention kernels: C = A B, C += A B or C = diag(s) C + A B, accumulated in registers.
//   A(i, k) is broadcast from a[i * row + k * col], so a transposed A costs nothing;
//   B comes by vectors from a loader: packed panels (Panels) or rows of a tensor in place (RowsInPlace);
//   C is row-major (rows, ldc), padded to whole vectors of columns.
// A panel is kTileVectors vectors of columns, contiguous over k: it streams through L1 without the conflicts that rows
// a power of two apart have there. Register tile: 6 rows x 4 vectors with 32 registers (24 accumulators, 4 of B,
// broadcasts from memory), 6 x 2 with 16 (12 accumulators, 2 of B, 1 broadcast). Every element is summed over k in
// order with one multiply-add a step, whatever the tile it falls in: a row's bits do not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/arithmetic.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

inline constexpr int kTileRows = 6;
// float64 runs for gradient checks: a narrow tile saves the compiler a third of its work.
template <class In>
inline constexpr int kTileVectors = sizeof(In) == 8    ? 1
                                    : kRegisters == 32 ? 4
                                                       : 2;

// Columns of a panel of In.
template <class In>
inline constexpr int kPanel = kTileVectors<In> * kLanes<In>;

template <class In>
struct MatrixA {
  const In* data;
  int64_t row;
  int64_t col;
};

enum class Accumulate { kOverwrite, kAdd, kScaleAndAdd };

// A tile's vectors of B in packed panels, `width` elements a step and `next` from panel to panel.
template <class In>
struct Panels {
  const In* data;
  int64_t width;
  int64_t next;
  Vec<In> operator()(int64_t k, int j) const {
    constexpr int kPerPanel = kTileVectors<In>;
    return load(data + (j / kPerPanel) * next + k * width + (j % kPerPanel) * kLanes<In>);
  }
};

template <class M, int kRows, int kVectors, Accumulate kMode, class LoadB>
inline void gemm_tile(const MatrixA<typename M::In>& a, const LoadB& b, const typename M::Out* row_scale,
                      typename M::Out* c, int64_t ldc, int depth) {
  using In = typename M::In;
  using Out = typename M::Out;
  Vec<Out> acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kMode == Accumulate::kOverwrite) acc[i][j] = Vec<Out>{};
      if constexpr (kMode == Accumulate::kAdd) acc[i][j] = load(c + i * ldc + j * kLanes<Out>);
      if constexpr (kMode == Accumulate::kScaleAndAdd) acc[i][j] = load(c + i * ldc + j * kLanes<Out>) * row_scale[i];
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec<In> bk[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) bk[j] = b(k, j);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec<In> aik = splat(a.data[i * a.row + k * a.col]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) acc[i][j] = M::step(aik, bk[j], acc[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes<Out>, acc[i][j]);
  }
}

// All rows (at most two where kVectors is more than a tile's) against the kVectors vectors of columns that b loads.
template <class M, int kVectors, Accumulate kMode, class LoadB>
inline void gemm_rows(MatrixA<typename M::In> a, const LoadB& b, const typename M::Out* row_scale, typename M::Out* c,
                      int64_t ldc, int rows, int depth) {
  if constexpr (kVectors <= kTileVectors<typename M::In>) {
    for (; rows >= kTileRows; rows -= kTileRows) {
      gemm_tile<M, kTileRows, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
      a.data += kTileRows * a.row;
      c += kTileRows * ldc;
      if constexpr (kMode == Accumulate::kScaleAndAdd) row_scale += kTileRows;
    }
    switch (rows) {
      case 5:
        return gemm_tile<M, 5, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
      case 4:
        return gemm_tile<M, 4, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
      case 3:
        return gemm_tile<M, 3, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
      default:
        break;
    }
  }
  switch (rows) {
    case 2:
      return gemm_tile<M, 2, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
    case 1:
      return gemm_tile<M, 1, kVectors, kMode>(a, b, row_scale, c, ldc, depth);
    default:
      return;
  }
}

// Steps [begin, end) of the depth.
struct Steps {
  int begin;
  int end;
};

// b: panels of `cols` columns (a multiple of a vector) packed over `packed_depth` steps, of which `steps` are taken.
// row_scale has one factor a row with kScaleAndAdd and is not read otherwise. Compiled once for all its callers.
template <class M, Accumulate kMode>
[[gnu::noinline]] void gemm(MatrixA<typename M::In> a, const typename M::In* b, int64_t packed_depth, Steps steps,
                            typename M::Out* c, int64_t ldc, int rows, int cols,
                            const typename M::Out* row_scale = nullptr) {
  using In = typename M::In;
  constexpr int kLane = kLanes<In>;
  const int depth = steps.end - steps.begin;
  a.data += steps.begin * a.col;
  int j = 0;
  const auto columns = [&]<int kVectors>() {
    const int first = j / kPanel<In> * kPanel<In>;
    const int64_t width = std::min(kPanel<In>, cols - first);
    const Panels<In> panel{b + first * packed_depth + steps.begin * width + (j - first), width,
                           packed_depth * kPanel<In>};
    gemm_rows<M, kVectors, kMode>(a, panel, row_scale, c + j, ldc, rows, depth);
    j += kVectors * kLane;
  };
  if (rows <= 2) {  // few rows need several panels at once, or the latency of their sums shows
    while (j + 2 * kPanel<In> <= cols) columns.template operator()<2 * kTileVectors<In>>();
  }
  while (j + kPanel<In> <= cols) columns.template operator()<kTileVectors<In>>();
  // The last panel is as narrow as its columns.
  if constexpr (kTileVectors<In> > 2) {
    while (j + 2 * kLane <= cols) columns.template operator()<2>();
  }
  while (j < cols) columns.template operator()<1>();
}

}  // namespace lcore::cpu::LCORE_ISA
