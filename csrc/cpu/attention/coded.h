// Pages of integer codes in attention: the scores of the keys in them, and their values times the weights. Codes cannot
// be rotated: keys that are stored before RoPE are unpacked (unpack.h), and only values are read here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/attention/block.h"
#include "cpu/attention/coded_product.h"
#include "cpu/attention/runs.h"

namespace lcore::cpu::LCORE_ISA {

template <class Fn>
inline void with_integers(PageFormat format, const Fn& fn) {
  switch (format) {
    case PageFormat::kInt8:
      return fn.template operator()<PageFormat::kInt8>();
    case PageFormat::kInt4:
      return fn.template operator()<PageFormat::kInt4>();
    case PageFormat::kInt2:
      return fn.template operator()<PageFormat::kInt2>();
    default:
      throw std::invalid_argument("page format must be int8, int4 or int2, got code " +
                                  std::to_string(static_cast<int>(format)));
  }
}

// The pages of one block of keys: `keys` of them, from its first on, stand in full pages of integers. No block has both
// plain and coded pages.
struct CodedPages {
  const AttentionParams& p;
  const Sequence& s;
  int64_t key;
  int keys;
  bool value;

  static int count(const AttentionParams& p, const Sequence& s, bool value, int64_t key, int keys) {
    if (p.pages == nullptr || !is_integer(p.pages->format(value)) || (p.pages->before_rope() && !value)) return 0;
    if (key / p.pages->page_size < p.pages->plain_pages) return 0;
    const int64_t full = s.k_len / p.pages->page_size * p.pages->page_size;
    return static_cast<int>(std::clamp<int64_t>(full - key, 0, keys));
  }

  // What is read after the page at `begin`: the next page's same side, or, behind the block's last, what `turn` says.
  const char* next(int begin, int64_t turn) const {
    const int size = static_cast<int>(p.pages->page_size);
    const bool last = begin + size >= keys;
    const int64_t at = last ? turn : key + begin + size;
    const bool held = at / size < s.k_len / size;
    return reinterpret_cast<const char*>(page_of(p, s, held && last ? !value : value, held ? at : key + begin));
  }

  // scores[row][key] of the block's rows for its coded keys; q: [rows][ld_q].
  void multiply_keys(const Block& block, const float* q, int ld_q, const CodedScratch& scratch, float* scores,
                     int ld_scores) const {
    const int size = static_cast<int>(p.pages->page_size);
    with_integers(p.pages->k_format, [&]<PageFormat kFormat>() {
      const int64_t steps = steps_of(kFormat, p.head_dim);
      for (int begin = 0; begin < keys; begin += size) {
        const Steps rows = block.rows_seeing(p, begin, size);
        if (rows.begin == rows.end) continue;
        const uint8_t* codes = page_of(p, s, false, key + begin);
        load_grid<kFormat>(codes, page_side(kFormat, false, size, p.head_dim), p.head_dim, scratch);
        for (int r = rows.begin; r < rows.end; ++r) {
          round_row<false>(q + int64_t{r} * ld_q, scratch.step, scratch.origin, p.head_dim,
                           2 * planes_of(kFormat) * steps, scratch, r - rows.begin);
        }
        float* to = scores + int64_t{rows.begin} * ld_scores + begin;
        coded_product<kFormat>(scratch, rows.end - rows.begin, reinterpret_cast<const uint32_t*>(codes), size, size,
                               steps, next(begin, key), [&](int r, int c, Vec<float> sum) {
                                 store(to + int64_t{r} * ld_scores + c, sum * scratch.scale[r] + scratch.bias[r]);
                               });
      }
    });
  }

  // out[row] += weights[row] V over the coded keys; `block_keys` from this block to the next.
  void add_values(const Block& block, const float* weights, int ld_weights, const CodedScratch& scratch, float* out,
                  int ld_out, int block_keys) const {
    const int size = static_cast<int>(p.pages->page_size);
    with_integers(p.pages->v_format, [&]<PageFormat kFormat>() {
      const int64_t columns = word_columns(p.head_dim_v);
      for (int begin = 0; begin < keys; begin += size) {
        const Steps rows = block.rows_seeing(p, begin, size);
        if (rows.begin == rows.end) continue;
        const uint8_t* codes = page_of(p, s, true, key + begin);
        const auto groups = static_cast<int>(value_groups(p.head_dim_v));
        load_grid<kFormat>(codes, page_side(kFormat, true, size, p.head_dim_v), int64_t{groups} * size, scratch);
        const char* ahead = next(begin, key + block_keys);
        for (int g = 0; g < groups; ++g) {
          const int first = g * kValueGroup;
          for (int r = rows.begin; r < rows.end; ++r) {
            round_row<true>(weights + int64_t{r} * ld_weights + begin, scratch.step + g * size,
                            scratch.origin + g * size, size, size, scratch, r - rows.begin);
          }
          float* to = out + int64_t{rows.begin} * ld_out + first;
          coded_product<kFormat>(scratch, rows.end - rows.begin, reinterpret_cast<const uint32_t*>(codes) + first,
                                 columns, std::min(kValueGroup, ld_out - first), steps_of(kFormat, size),
                                 ahead + 4 * first, [&](int r, int c, Vec<float> sum) {
                                   float* at = to + int64_t{r} * ld_out + c;
                                   store(at, load(at) + (sum * scratch.scale[r] + scratch.bias[r]));
                                 });
        }
      }
    });
  }
};

}  // namespace lcore::cpu::LCORE_ISA
