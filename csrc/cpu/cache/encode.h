// K or V of a full page from float rows to codes, scales and zeros (core/page_format.h). Rounding is chosen so that the
// codes follow from the float values alone, on every machine: a zero is rounded down to float16 and a scale up, so that
// the grid covers its values, and codes are the nearest to (x - zero) / scale, ties to even. What exceeds float16
// saturates. A group with a value that is not finite gets NaN for its zero (fp8: its scale): it cannot go unnoticed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/page_format.h"

namespace lcore::cpu::LCORE_ISA {

inline constexpr int kMostPageDim = 512;
inline constexpr float kMostHalf = 65504.0f;

// x in float16, rounded up or down.
inline Half half_beyond(float x, bool up) {
  if (!(std::abs(x) < kMostHalf)) return to_half(std::clamp(x, -kMostHalf, kMostHalf));
  const Half nearest = to_half(x);
  const float value = to_float(nearest);
  if (up ? value >= x : value <= x) return nearest;
  if ((nearest.bits & 0x7fffu) == 0) return {static_cast<uint16_t>(up ? 0x0001u : 0x8001u)};
  const bool grows = (nearest.bits & 0x8000u) == 0 ? up : !up;
  return {static_cast<uint16_t>(nearest.bits + (grows ? 1 : -1))};
}

// Smallest and largest of a group, and whether all of it is finite.
struct Extent {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  float spoilt = 0;  // NaN once a value was not finite
  void add(float x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    spoilt += x - x;
  }
};

struct Grid {
  Half scale;
  Half zero;
  float step;    // scale, or 1 where every value is the zero
  float origin;  // zero
};

inline Grid integer_grid(const Extent& e, int levels) {
  if (e.spoilt != 0) return {{0}, {0x7e00u}, 1.0f, 0.0f};
  const Half zero = half_beyond(e.low, false);
  const float origin = to_float(zero);
  const Half scale = half_beyond(std::max(e.high - origin, 0.0f) / static_cast<float>(levels), true);
  return {scale, zero, scale.bits == 0 ? 1.0f : to_float(scale), origin};
}

inline Grid float8_grid(const Extent& e) {
  if (e.spoilt != 0) return {{0x7e00u}, {0}, 1.0f, 0.0f};
  const Half scale = half_beyond(std::max(e.high, -e.low) / 448.0f, true);
  return {scale, {0}, scale.bits == 0 ? 1.0f : to_float(scale), 0.0f};
}

// The nearest integer in [0, levels]; NaN gives 0.
inline uint8_t nearest_code(float x, float levels) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float low = x > 0 ? x : 0;
  return static_cast<uint8_t>(((low < levels ? low : levels) + kMagic) - kMagic);
}

// The nearest e4m3 number: 4 bits of exponent with bias 7, 3 of mantissa, largest 448; NaN gives 0.
inline uint8_t nearest_float8(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  const float magnitude = std::abs(x);
  if (!(magnitude >= 0x1p-6f)) {  // subnormal: adding 2^14 rounds at the last bit, 2^-9
    return magnitude < 0x1p-6f ? sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(magnitude + 0x1p14f)) : 0;
  }
  const uint32_t m = bits & 0x7fffffffu;
  const uint32_t rounded = ((m + 0x7ffffu + ((m >> 20) & 1u)) >> 20) - (120u << 3);
  return sign | static_cast<uint8_t>(std::min(rounded, 0x7eu));
}

// Codes of one side of a page, and the grid of each of their groups.
class PageEncoder {
 public:
  // rows: [page_size][dim], contiguous. out: page_side(..).bytes.
  PageEncoder(PageFormat format, bool value, int page_size, int dim, uint8_t* out)
      : format_(format),
        value_(value),
        page_size_(page_size),
        dim_(dim),
        out_(out),
        side_(page_side(format, value, page_size, dim)) {}

  void encode(const float* rows) {
    std::memset(out_, 0, side_.bytes);
    if (!value_) {
      Extent extents[kMostPageDim];
      for (int r = 0; r < page_size_; ++r) {
        for (int c = 0; c < dim_; ++c) extents[c].add(rows[int64_t{r} * dim_ + c]);
      }
      for (int c = 0; c < dim_; ++c) set_grid(c, c, extents[c]);
    }
    for (int r = 0; r < page_size_; ++r) {
      const float* row = rows + int64_t{r} * dim_;
      if (value_) set_row_grids(r, row);
      code_row(row);
      is_integer(format_) ? put_words(r) : put_bytes(r);
    }
  }

 private:
  Half* scales() const { return reinterpret_cast<Half*>(out_ + side_.scales); }
  Half* zeros() const { return reinterpret_cast<Half*>(out_ + side_.zeros); }

  // The grid of columns step_[c]: where it is stored is `index`.
  void set_grid(int c, int64_t index, const Extent& extent) {
    const Grid grid = is_integer(format_) ? integer_grid(extent, (1 << bits_of(format_)) - 1) : float8_grid(extent);
    scales()[index] = grid.scale;
    if (is_integer(format_)) zeros()[index] = grid.zero;
    step_[c] = grid.step;
    origin_[c] = grid.origin;
  }

  void set_row_grids(int r, const float* row) {
    for (int begin = 0; begin < dim_; begin += kValueGroup) {
      const int end = std::min(begin + kValueGroup, dim_);
      Extent extent;
      for (int c = begin; c < end; ++c) extent.add(row[c]);
      set_grid(begin, int64_t{begin / kValueGroup} * page_size_ + r, extent);
      std::fill(step_ + begin + 1, step_ + end, step_[begin]);
      std::fill(origin_ + begin + 1, origin_ + end, origin_[begin]);
    }
  }

  void code_row(const float* row) {
    if (is_integer(format_)) {
      const auto levels = static_cast<float>((1 << bits_of(format_)) - 1);
      const uint8_t flip = format_ == PageFormat::kInt8 ? 0x80 : 0;
      for (int c = 0; c < dim_; ++c) codes_[c] = nearest_code((row[c] - origin_[c]) / step_[c], levels) ^ flip;
    } else {
      for (int c = 0; c < dim_; ++c) codes_[c] = nearest_float8(row[c] / step_[c]);
    }
  }

  void put_bytes(int r) { std::memcpy(out_ + int64_t{r} * dim_, codes_, dim_); }

  void put_words(int r) {
    auto* words = reinterpret_cast<uint32_t*>(out_);
    const int bits = bits_of(format_), planes = planes_of(format_);
    // Of K a row is a column of words; of V it is one half of a plane of a row of words.
    if (value_) {
      const int shift = 16 * (r % 2) + bits * (r / 2 % planes);
      uint32_t* to = words + r / (2 * planes) * word_columns(dim_);
      for (int c = 0; c < dim_; ++c) to[c] |= uint32_t{codes_[c]} << shift;
      return;
    }
    std::fill(codes_ + dim_, codes_ + 2 * planes * steps_of(format_, dim_), uint8_t{0});
    for (int64_t step = 0; step < steps_of(format_, dim_); ++step) {
      uint32_t word = 0;
      for (int i = 0; i < planes; ++i) {
        const uint8_t* pair = codes_ + 2 * (step * planes + i);
        word |= (pair[0] | uint32_t{pair[1]} << 16) << (bits * i);
      }
      words[step * page_size_ + r] = word;
    }
  }

  PageFormat format_;
  bool value_;
  int page_size_;
  int dim_;
  uint8_t* out_;
  PageSide side_;
  float step_[kMostPageDim];
  float origin_[kMostPageDim];
  uint8_t codes_[kMostPageDim + 16];
};

}  // namespace lcore::cpu::LCORE_ISA
