// Products of rows of float with integer codes of pages, which are never expanded: sum_k a_k (zero_k + scale_k code_k)
// = sum_k (a_k scale_k) code_k + sum_k a_k zero_k. The factors a_k scale_k are rounded once a page to 16-bit integers
// under the largest of their row: 2^-16 of it, finer than bfloat16, and from there on the sums are exact, in 32 bits:
// 32767 * 128 * 512 channels < 2^31. So one and six hundred rows give a row the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/half.h"
#include "cpu/int16_pairs.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// Registers: rows x vectors sums, the vectors as stored, and one plane of each.
inline constexpr int kCodedRows = 4;  // the query heads of a group, often
inline constexpr int kCodedVectors = kRegisters == 32 ? 4 : 2;

// Factors of a page's rows, and what their sums are worth: value = scale * sum + bias.
struct CodedScratch {
  int32_t* pairs;  // [rows][ld]
  int64_t ld;
  float* scale;   // [rows]
  float* bias;    // [rows]
  float* step;    // [channels] of K, or [groups][page_size] of V
  float* origin;  // the same: what the code 0 as stored stands for

  static CodedScratch lay_out(int rows, int64_t page_size, int dim, int dim_v, Arena& arena) {
    const int64_t ld = std::max<int64_t>(page_size, dim + 16) / 2;  // a row of K is padded to whole words: 16 codes
    const int64_t grid = std::max<int64_t>(word_columns(dim), value_groups(dim_v) * page_size);
    const int padded = round_up_lanes<float>(rows);
    return {arena.take<int32_t>(rows * ld), ld,
            arena.take<float>(padded),      arena.take<float>(padded),
            arena.take<float>(grid),        arena.take<float>(grid)};
  }
};

// The `count` scales and zeros of one side of a page.
template <PageFormat kFormat>
inline void load_grid(const uint8_t* codes, const PageSide& side, int64_t count, const CodedScratch& s) {
  const auto* scales = reinterpret_cast<const Half*>(codes + side.scales);
  const auto* zeros = reinterpret_cast<const Half*>(codes + side.zeros);
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> step = load_float(scales + i);
    store(s.step + i, step);
    store(s.origin + i, load_float(zeros + i) + kCodeOffset<kFormat> * step);
  }
}

// One row's factors x * step in 16 bits. With kSkipZeros, what stands where x is 0 is not read: a NaN there is masked.
template <bool kSkipZeros>
inline void round_row(const float* x, const float* step, const float* origin, int count, int64_t padded,
                      const CodedScratch& s, int row) {
  constexpr int kLane = kLanes<float>;
  Vec<float> most{}, bias{};
  const auto add = [&](Vec<float> v, Vec<float> o) {
    if constexpr (kSkipZeros) o = v == 0.0f ? Vec<float>{} : o;
    bias += v * o;
  };
  const auto at = [&](const float* p, int c) {  // whole vectors: zeros behind the last
    Vec<float> v{};
    std::memcpy(&v, p + c, std::min(kLane, count - c) * sizeof(float));
    return v;
  };
  const int whole = count / kLane * kLane;
  const auto measure = [&](Vec<float> v, Vec<float> st, Vec<float> o) {
    const Vec<float> y = v * st;
    most = max<float>(most, y < 0.0f ? -y : y);
    add(v, o);
  };
  for (int c = 0; c < whole; c += kLane) measure(load(x + c), load(step + c), load(origin + c));
  if (whole < count) measure(at(x, whole), at(step, whole), at(origin, whole));
  const float largest = reduce_max<float>(most);
  const float inverse = largest > 1e-30f ? 32767.0f / largest : 0.0f;
  s.scale[row] = inverse == 0.0f ? 0.0f : largest / 32767.0f;
  s.bias[row] = reduce_add<float>(bias);
  auto* out = reinterpret_cast<uint16_t*>(s.pairs + row * s.ld);
  const auto put = [&](int c, Vec<float> v, Vec<float> st) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    const auto bits = reinterpret_cast<Vec<uint32_t>>(v * st * inverse + kMagic);
    const HalfBits halves = narrow_bits(bits & 0xffffu);
    std::memcpy(out + c, &halves, sizeof(halves));
  };
  for (int c = 0; c < whole; c += kLane) put(c, load(x + c), load(step + c));
  if (whole < count) put(whole, at(x, whole), at(step, whole));
  std::fill(out + count, out + padded, uint16_t{0});
}

template <PageFormat kFormat, int kRows, int kVectors, class Emit>
inline void coded_tile(const int32_t* a, int64_t ld, const uint32_t* words, int64_t ld_words, int64_t steps,
                       const char* ahead, const Emit& emit) {
  constexpr int kPlanes = planes_of(kFormat);
  Vec<int32_t> sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = Vec<int32_t>{};
  }
  for (int64_t step = 0; step < steps; ++step) {
    __builtin_prefetch(ahead + step * ld_words * 4);
    Vec<uint32_t> w[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) w[j] = load(words + step * ld_words + j * kLanes<float>);
#pragma GCC unroll 8
    for (int i = 0; i < kPlanes; ++i) {
      Vec<int32_t> b[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) b[j] = plane<kFormat>(w[j], i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec<int32_t> factor = splat(a[r * ld + step * kPlanes + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          sums[r][j] = multiply_pairs(factor, b[j], sums[r][j]);
          in_register(sums[r][j]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) emit(r, j * kLanes<float>, __builtin_convertvector(sums[r][j], Vec<float>));
  }
}

// emit(row, column, vector of sums) for all rows of s and `columns` columns of words. `ahead` is where the words stand
// that are needed next: a line of them is asked for with every line of these that is read.
template <PageFormat kFormat, class Emit>
inline void coded_product(const CodedScratch& s, int rows, const uint32_t* words, int64_t ld_words, int columns,
                          int64_t steps, const char* ahead, const Emit& emit) {
  int c = 0;
  const auto tiles = [&]<int kVectors>() {
    for (; c + kVectors * kLanes<float> <= columns; c += kVectors * kLanes<float>) {
      for (int r = 0; r < rows; r += kCodedRows) {
        const auto at = [&](int row, int column, Vec<float> sum) { emit(r + row, c + column, sum); };
        const int32_t* a = s.pairs + r * s.ld;
        switch (std::min(rows - r, kCodedRows)) {
          case 1:
            coded_tile<kFormat, 1, kVectors>(a, s.ld, words + c, ld_words, steps, ahead + 4 * c, at);
            break;
          case 2:
            coded_tile<kFormat, 2, kVectors>(a, s.ld, words + c, ld_words, steps, ahead + 4 * c, at);
            break;
          case 3:
            coded_tile<kFormat, 3, kVectors>(a, s.ld, words + c, ld_words, steps, ahead + 4 * c, at);
            break;
          default:
            coded_tile<kFormat, 4, kVectors>(a, s.ld, words + c, ld_words, steps, ahead + 4 * c, at);
        }
      }
    }
  };
  tiles.template operator()<kCodedVectors>();
  if constexpr (kCodedVectors > 2) tiles.template operator()<2>();
  tiles.template operator()<1>();
}

}  // namespace lcore::cpu::LCORE_ISA
