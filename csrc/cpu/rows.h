// Rows of a tensor of any element type and stride, widened into a tile of float or double, and back.
// A tile is row-major with leading dimension ld >= cols; load_rows fills columns [cols, ld) with zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "cpu/half.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// Where rows lie in memory: row r, column c at data + (r * row_stride + c * col_stride) elements of type.
struct RowsIn {
  const void* data;
  DType type;
  int64_t row_stride;
  int64_t col_stride;
  const void* next = nullptr;  // where rows go on behind these, if they do: to ask for them in time
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Half x) { return to_float(x); }

inline Vec<float> load_float(const float* p) { return load(p); }

template <class T, class Element>
inline void load_row(const Element* src, int64_t stride, T* dst, int cols, T scale = T{1}) {
  int c = 0;
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<Element, double>) {
    if (stride == 1) {
      for (; c + kLanes<float> <= cols; c += kLanes<float>) store(dst + c, load_float(src + c) * scale);
    }
  }
  for (; c < cols; ++c) dst[c] = static_cast<T>(widen(src[c * stride])) * scale;
}

// Rows of a tensor with heads lie far apart, and pages anywhere, where the hardware does not prefetch: sixteen rows
// ahead cover the latency of memory at the pace of a copy.
inline constexpr int kRowsAhead = 16;

// Asks for the row that comes kRowsAhead after row r of `rows`.
template <class Element>
inline void prefetch_ahead(const RowsIn& in, const Element* data, int r, int rows, int cols) {
  constexpr int kLine = 64 / sizeof(Element);
  const Element* row = data + (r + kRowsAhead) * in.row_stride;
  if (r + kRowsAhead >= rows) {
    if (in.next == nullptr) return;
    row = static_cast<const Element*>(in.next) + (r + kRowsAhead - rows) * in.row_stride;
  }
  for (int c = 0; c < cols; c += kLine) __builtin_prefetch(row + c);
  __asm__ volatile("");  // g++ deletes calls that do nothing but prefetch
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

template <class T>
inline void load_rows(const RowsIn& in, int rows, int cols, T* tile, int ld) {
  with_type(in.data, in.type, [&](const auto* src) {
    for (int r = 0; r < rows; ++r) {
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

}  // namespace lcore::cpu::LCORE_ISA
