// How K or V of a page is coded, and where its parts stand. Plain formats store the values themselves, row-major
// [page_size][dim]. Coded ones store a value x as the nearest code to (x - zero) / scale:
//   int8, int4, int2: asymmetric, codes 0 .. 2^bits - 1. K has a scale and a zero a channel, over the page's tokens; V
//   a
//     scale and a zero a token, over groups of kValueGroup channels (Liu et al. 2024, KIVI).
//   fp8: e4m3 codes of x / scale, row-major; scales as above, no zeros.
// Integer codes lie in words of 32 bits as the products read them. A word holds 2 * kPlanes codes that follow each
// other along the summed dimension (channels for K, tokens for V): code 2 * i + h in bits [16 h + bits i, + bits). So
// one shift and one mask give both halves as a pair of 16-bit integers, whatever the width of a vector. Words of K are
// [steps][page_size], of V [steps][dim, padded to 16]. An int8 code is stored with its highest bit flipped: signed.
// Scales, then zeros, are float16: of K [dim], of V [groups][page_size].
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace lcore {

enum class PageFormat : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8, kInt8, kInt4, kInt2 };

inline constexpr int64_t kPageAlignment = 64;  // a cache line, and the widest vector
inline constexpr int kValueGroup = 64;         // channels of V that share a scale
inline constexpr int kWordLanes = 16;          // words of V's channels come in whole vectors of this many

constexpr bool is_plain(PageFormat format) { return format <= PageFormat::kBFloat16; }
constexpr bool is_integer(PageFormat format) { return format >= PageFormat::kInt8; }

constexpr DType plain_type(PageFormat format) {
  return format == PageFormat::kFloat32   ? DType::kFloat32
         : format == PageFormat::kFloat16 ? DType::kFloat16
                                          : DType::kBFloat16;
}

constexpr PageFormat plain_format(DType type) {
  return type == DType::kFloat32   ? PageFormat::kFloat32
         : type == DType::kFloat16 ? PageFormat::kFloat16
                                   : PageFormat::kBFloat16;
}

constexpr int bits_of(PageFormat format) {
  switch (format) {
    case PageFormat::kFloat32:
      return 32;
    case PageFormat::kFloat16:
    case PageFormat::kBFloat16:
      return 16;
    case PageFormat::kInt4:
      return 4;
    case PageFormat::kInt2:
      return 2;
    default:
      return 8;
  }
}

// Planes of a word of integer codes, and the words that `codes` codes along the summed dimension take.
constexpr int planes_of(PageFormat format) { return 16 / bits_of(format); }
constexpr int64_t steps_of(PageFormat format, int64_t codes) {
  const int64_t step = 2 * planes_of(format);
  return (codes + step - 1) / step;
}
constexpr int64_t value_groups(int64_t dim) { return (dim + kValueGroup - 1) / kValueGroup; }
constexpr int64_t word_columns(int64_t dim) { return (dim + kWordLanes - 1) / kWordLanes * kWordLanes; }

// Bytes of one side of a page, K or V: codes, then scales, then zeros, each from a multiple of 64.
struct PageSide {
  int64_t scales;
  int64_t zeros;
  int64_t bytes;
};

constexpr PageSide page_side(PageFormat format, bool value, int64_t page_size, int64_t dim) {
  const auto align = [](int64_t bytes) { return (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment; };
  if (!is_integer(format)) {
    const int64_t codes = align(page_size * dim * bits_of(format) / 8);
    if (is_plain(format)) return {codes, codes, codes};
    const int64_t scales = align(2 * (value ? value_groups(dim) * page_size : dim));
    return {codes, codes + scales, codes + scales};
  }
  const int64_t words = value ? steps_of(format, page_size) * word_columns(dim) : steps_of(format, dim) * page_size;
  const int64_t scales = align(2 * (value ? value_groups(dim) * page_size : dim));
  return {align(4 * words), align(4 * words) + scales, align(4 * words) + 2 * scales};
}

}  // namespace lcore
