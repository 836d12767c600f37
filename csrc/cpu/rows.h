// Rows of a tensor of any element type and stride, widened into a tile of float or double, and back.
// A tile is row-major with leading dimension ld >= cols; load_rows fills columns [cols, ld) with zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// Where rows lie in memory: row r, column c at data + (r * row_stride + c * col_stride) elements of type.
struct RowsIn {
  const void* data;
  DType type;
  int64_t row_stride;
  int64_t col_stride;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Half x) { return to_float(x); }

inline Vec<float> load_float(const float* p) { return load(p); }

template <class T, class Element>
inline void load_row(const Element* src, int64_t stride, T* dst, int cols) {
  int c = 0;
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<Element, double>) {
    if (stride == 1) {
      for (; c + kLanes<float> <= cols; c += kLanes<float>) store(dst + c, load_float(src + c));
    }
  }
  for (; c < cols; ++c) dst[c] = static_cast<T>(widen(src[c * stride]));
}

// Calls fn with a typed pointer to the elements.
template <class Fn>
inline void with_type(const void* data, DType type, const Fn& fn) {
  switch (type) {
    case DType::kFloat32:
      return fn(static_cast<const float*>(data));
    case DType::kFloat64:
      return fn(static_cast<const double*>(data));
    case DType::kFloat16:
      return fn(static_cast<const Half*>(data));
    case DType::kBFloat16:
      return fn(static_cast<const BFloat16*>(data));
    default:
      throw std::invalid_argument("element type must be float32, float64, float16 or bfloat16, got code " +
                                  std::to_string(static_cast<int>(type)));
  }
}

// Rows of a tensor with heads lie far apart, where the hardware does not prefetch: eight rows ahead cover the latency
// of memory at the pace of the copy.
inline constexpr int kRowsAhead = 8;

template <class Element>
inline void prefetch_row(const Element* row, int64_t stride, int cols) {
  constexpr int kLine = 64 / sizeof(Element);
  if (stride != 1) return;
  for (int c = 0; c < cols; c += kLine) __builtin_prefetch(row + c);
}

template <class T>
inline void load_rows(const RowsIn& in, int rows, int cols, T* tile, int ld) {
  with_type(in.data, in.type, [&](const auto* src) {
    for (int r = 0; r < rows; ++r) {
      if (r + kRowsAhead < rows) prefetch_row(src + (r + kRowsAhead) * in.row_stride, in.col_stride, cols);
      load_row(src + r * in.row_stride, in.col_stride, tile + int64_t{r} * ld, cols);
      std::fill(tile + int64_t{r} * ld + cols, tile + int64_t{r + 1} * ld, T{0});
    }
  });
}

inline void narrow(float x, float* p) { *p = x; }
inline void narrow(double x, double* p) { *p = x; }
inline void narrow(double x, float* p) { *p = static_cast<float>(x); }
inline void narrow(float x, double* p) { *p = x; }
inline void narrow(float x, BFloat16* p) { *p = to_bfloat16(x); }
inline void narrow(float x, Half* p) { *p = to_half(x); }
inline void narrow(double x, BFloat16* p) { *p = to_bfloat16(static_cast<float>(x)); }
inline void narrow(double x, Half* p) { *p = to_half(static_cast<float>(x)); }

// One contiguous row, rounded to nearest even.
template <class T>
inline void store_row(const T* src, int cols, void* data, DType type) {
  with_type(data, type, [&](const auto* typed) {
    auto* dst = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>*>(typed);
    int c = 0;
    if constexpr (std::is_same_v<T, float> && sizeof(*dst) == 2) {
      for (; c + kLanes<float> <= cols; c += kLanes<float>) store_half(dst + c, load(src + c));
    }
    for (; c < cols; ++c) narrow(src[c], dst + c);
  });
}

// A square of vectors, transposed in registers: each round interleaves the upper half of the rows with the lower half,
// and log2(lanes) such perfect shuffles exchange row and column.
template <class T>
inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  IVec<T> low{}, high{};
  for (int i = 0; i < kN; ++i) {
    low[i] = i / 2 + (i % 2) * kN;
    high[i] = low[i] + kN / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kN; round *= 2) {
    Vec<T> next[kN];
#pragma GCC unroll 8
    for (int i = 0; i < kN / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kN / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kN / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) v[i] = next[i];
  }
}

// out[c][r] = rows[r][c] from a row-major tile of ld_in, squares of vectors first, the edges by element.
template <class T>
inline void transpose(const T* rows, int ld_in, int num_rows, int num_cols, T* out, int ld_out) {
  constexpr int kN = kLanes<T>;
  const int square_rows = num_rows / kN * kN, square_cols = num_cols / kN * kN;
  for (int r0 = 0; r0 < square_rows; r0 += kN) {
    for (int c0 = 0; c0 < square_cols; c0 += kN) {
      Vec<T> v[kN];
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) v[i] = load(rows + int64_t{r0 + i} * ld_in + c0);
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) store(out + int64_t{c0 + i} * ld_out + r0, v[i]);
    }
  }
  const auto by_element = [&](int r_begin, int r_end, int c_begin, int c_end) {
    for (int r = r_begin; r < r_end; ++r) {
      for (int c = c_begin; c < c_end; ++c) out[int64_t{c} * ld_out + r] = rows[int64_t{r} * ld_in + c];
    }
  };
  by_element(0, square_rows, square_cols, num_cols);
  by_element(square_rows, num_rows, 0, num_cols);
}

}  // namespace lcore::cpu::LCORE_ISA
