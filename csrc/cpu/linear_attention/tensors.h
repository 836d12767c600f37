// Rows of tensors and tiles as the kernels of linear attention read and write them. A tensor's element may be one of
// four types, but beside float64 it is float64; none of this is inlined: the compiler would repeat it for every type at
// every use.
#pragma once

#include "cpu/linear_attention/item.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
[[gnu::noinline]] void load_tensor(const RowsIn& in, int rows, int cols, T* tile, int ld) {
  if constexpr (sizeof(T) == 8) {
    for (int r = 0; r < rows; ++r, tile += ld) {
      load_row(static_cast<const double*>(in.data) + r * in.row_stride, in.col_stride, tile, cols);
      std::fill(tile + cols, tile + ld, T{0});
    }
  } else {
    load_rows(in, rows, cols, tile, ld);
  }
}

// Into panels over the rows.
template <class T>
[[gnu::noinline]] void pack_tensor(const RowsIn& in, int rows, int cols, T* panels, int ld) {
  if constexpr (sizeof(T) == 8) {
    for (int r = 0; r < rows; ++r) {
      const double* row = static_cast<const double*>(in.data) + r * in.row_stride;
      for_each_vector(panels, rows, ld, r,
                      [&](T* place, int c) { store(place, load_columns<T>(row, in.col_stride, c, cols)); });
    }
  } else {
    pack_rows<Widened<T>>(in, rows, cols, panels, rows, ld);
  }
}

// One row, rounded to nearest even.
template <class T>
[[gnu::noinline]] void store_tensor(const T* row, int cols, void* data, DType type) {
  if constexpr (sizeof(T) == 8) {
    std::copy(row, row + cols, static_cast<double*>(data));
  } else {
    store_row(row, cols, data, type);
  }
}

// A tile's rows, padded with zeros to vectors, into panels over the rows.
template <class T>
void pack_tile(const T* tile, int ld, int rows, T* panels) {
  for (int r = 0; r < rows; ++r) {
    for_each_vector(panels, rows, ld, r, [&](T* place, int c) { store(place, load(tile + r * ld + c)); });
  }
}

// A tile's rows as columns of panels over `dim` steps; columns that fill up the last vector are zero.
template <class T>
[[gnu::noinline]] void pack_transposed(const T* tile, int64_t ld, int rows, int dim, T* panels) {
  const int cols = round_up_lanes<T>(rows);
  if (cols != rows) {
    const int last = (cols - 1) / kPanel<T> * kPanel<T>;
    std::fill(panels + int64_t{last} * dim, panels + int64_t{cols} * dim, T{0});
  }
  pack_columns<Widened<T>>({tile, kTypeOf<T>, ld, 1}, rows, dim, panels, cols);
}

}  // namespace lcore::cpu::LCORE_ISA
