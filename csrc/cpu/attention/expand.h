// Rows of a coded page as float, zero + scale * code, for whoever reads rows: products of fp8, and bounds of keys.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "core/page_format.h"
#include "cpu/half.h"

namespace lcore::cpu::LCORE_ISA {

// e4m3 codes. Multiplying by 2^120 moves the exponent bias from 7 to 127 and normalises subnormals exactly.
inline Vec<float> load_float8(const uint8_t* p) {
  typename VectorOf<uint8_t, kLanes<float>>::type codes;
  std::memcpy(&codes, p, sizeof(codes));
  const auto bits = __builtin_convertvector(codes, Vec<uint32_t>);
  const auto magnitude = reinterpret_cast<Vec<float>>((bits & 0x7fu) << 20) * 0x1p120f;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(magnitude) | (bits & 0x80u) << 24);
}

class PageExpander {
 public:
  // codes: one side of a page.
  PageExpander(PageFormat format, bool value, const uint8_t* codes, int64_t page_size, int dim)
      : format_(format), value_(value), codes_(codes), page_size_(page_size), dim_(dim) {
    const PageSide side = page_side(format, value, page_size, dim);
    scales_ = reinterpret_cast<const Half*>(codes + side.scales);
    zeros_ = reinterpret_cast<const Half*>(codes + side.zeros);
    if (!value) {
      for (int c = 0; c < dim; ++c) set_grid(c, c + 1, c);
    }
  }

  // out[c] of row r of the page.
  void expand(int64_t r, float* out) {
    if (value_) {
      for (int c = 0; c < dim_; c += kValueGroup) {
        set_grid(c, std::min(c + kValueGroup, dim_), c / kValueGroup * page_size_ + r);
      }
    }
    is_integer(format_) ? (value_ ? integers_of_value(r) : integers_of_key(r)) : floats(r);
    for (int c = 0; c < dim_; ++c) out[c] = zero_[c] + scale_[c] * code_[c];
  }

 private:
  void set_grid(int begin, int end, int64_t index) {
    std::fill(scale_ + begin, scale_ + end, to_float(scales_[index]));
    std::fill(zero_ + begin, zero_ + end, is_integer(format_) ? to_float(zeros_[index]) : 0.0f);
  }

  void floats(int64_t r) {
    const uint8_t* row = codes_ + r * dim_;
    int c = 0;
    for (; c + kLanes<float> <= dim_; c += kLanes<float>) store(code_ + c, load_float8(row + c));
    uint8_t rest[kLanes<float>] = {};
    std::memcpy(rest, row + c, dim_ - c);
    store(code_ + c, load_float8(rest));
  }

  float number(uint32_t word, int shift) const {
    const uint32_t code = (word >> shift) & ((1u << bits_of(format_)) - 1);
    return static_cast<float>(format_ == PageFormat::kInt8 ? code ^ 0x80u : code);
  }

  void integers_of_value(int64_t r) {
    const int planes = planes_of(format_);
    const auto* row = reinterpret_cast<const uint32_t*>(codes_) + r / (2 * planes) * word_columns(dim_);
    const int shift = static_cast<int>(16 * (r % 2) + bits_of(format_) * (r / 2 % planes));
    for (int c = 0; c < dim_; ++c) code_[c] = number(row[c], shift);
  }

  void integers_of_key(int64_t r) {
    const int planes = planes_of(format_);
    for (int c = 0; c < dim_; c += 2 * planes) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(codes_)[c / (2 * planes) * page_size_ + r];
      for (int i = 0; i < 2 * planes; ++i) code_[c + i] = number(word, 16 * (i % 2) + bits_of(format_) * (i / 2));
    }
  }

  static constexpr int kMostDim = 512;
  PageFormat format_;
  bool value_;
  const uint8_t* codes_;
  int64_t page_size_;
  int dim_;
  const Half* scales_;
  const Half* zeros_;
  float scale_[kMostDim];
  float zero_[kMostDim];
  float code_[kMostDim + 16];  // a word's codes or a vector may reach beyond the last channel
};

// out[i][c], contiguous: rows [first, first + count) of one side of a page.
inline void expand_rows(PageFormat format, bool value, const uint8_t* codes, int64_t page_size, int dim, int64_t first,
                        int count, float* out) {
  PageExpander page(format, value, codes, page_size, dim);
  for (int i = 0; i < count; ++i) page.expand(first + i, out + int64_t{i} * dim);
}

}  // namespace lcore::cpu::LCORE_ISA
