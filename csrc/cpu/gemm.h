// The one matrix product of the attention kernels: C = A B or C = diag(s) C + A B, accumulated in registers.
//   A(i, k) is read as scalars at a[i * a_row + k * a_col], so a transposed A costs nothing;
//   B is row-major (k, ldb), C row-major (rows, ldc), both padded to whole vectors of columns.
// Register tile: 6 rows x 4 vectors with 32 registers (24 accumulators, 4 of B, broadcasts from memory), 6 x 2 with 16
// (12 accumulators, 2 of B, 1 broadcast). Every element is summed over k in order with one FMA a step, whatever the
// tile it falls in: a row's bits do not depend on how many rows stand beside it. The loops over the tile are unrolled
// by name, or the accumulators would be an array in memory.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

template <class T>
struct MatrixA {
  const T* data;
  int64_t row;
  int64_t col;
};

enum class Accumulate { kOverwrite, kAdd, kScaleAndAdd };

template <class T, int kRows, int kVectors, Accumulate kMode>
inline void gemm_tile(const MatrixA<T>& a, const T* b, int64_t ldb, const T* row_scale, T* c, int64_t ldc, int depth) {
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kMode == Accumulate::kOverwrite) acc[i][j] = Vec<T>{};
      if constexpr (kMode == Accumulate::kAdd) acc[i][j] = load(c + i * ldc + j * kLanes<T>);
      if constexpr (kMode == Accumulate::kScaleAndAdd) acc[i][j] = load(c + i * ldc + j * kLanes<T>) * row_scale[i];
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec<T> bk[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) bk[j] = load(b + k * ldb + j * kLanes<T>);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> aik = splat(a.data[i * a.row + k * a.col]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += aik * bk[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
  }
}

template <class T, int kVectors, Accumulate kMode>
inline void gemm_panel(MatrixA<T> a, const T* b, int64_t ldb, const T* row_scale, T* c, int64_t ldc, int rows,
                       int depth) {
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    gemm_tile<T, kTileRows, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    a.data += kTileRows * a.row;
    c += kTileRows * ldc;
    if constexpr (kMode == Accumulate::kScaleAndAdd) row_scale += kTileRows;
  }
  switch (rows - i) {
    case 5:
      return gemm_tile<T, 5, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    case 4:
      return gemm_tile<T, 4, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    case 3:
      return gemm_tile<T, 3, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    case 2:
      return gemm_tile<T, 2, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    case 1:
      return gemm_tile<T, 1, kVectors, kMode>(a, b, ldb, row_scale, c, ldc, depth);
    default:
      return;
  }
}

// cols is a multiple of a vector. row_scale has one factor a row with kScaleAndAdd and is not read otherwise.
template <class T, Accumulate kMode>
inline void gemm(MatrixA<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int rows, int cols, int depth,
                 const T* row_scale = nullptr) {
  constexpr int kPanel = kTileVectors * kLanes<T>;
  int j = 0;
  for (; j + kPanel <= cols; j += kPanel) {
    gemm_panel<T, kTileVectors, kMode>(a, b + j, ldb, row_scale, c + j, ldc, rows, depth);
  }
  for (; j < cols; j += kLanes<T>) gemm_panel<T, 1, kMode>(a, b + j, ldb, row_scale, c + j, ldc, rows, depth);
}

}  // namespace lcore::cpu::LCORE_ISA
