// Keys of integer pages as columns of panels: zero + scale * code of every channel. Words of K run over the keys, as
// the vectors of a panel do, so that a vector of words becomes one of each of its channels by a shift, a conversion and
// a multiply-add, without a transpose. For keys that are rotated before they are multiplied, or only scored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention/coded.h"
#include "cpu/panels.h"

namespace lcore::cpu::LCORE_ISA {

// Of keys [begin, begin + keys), those that stand in pages of integers; nothing of V.
inline Steps integer_keys(const AttentionParams& p, const Sequence& s, bool value, int64_t begin, int keys) {
  if (p.pages == nullptr || value || !is_integer(p.pages->k_format)) return {0, 0};
  const int64_t size = p.pages->page_size;
  const auto first = std::clamp<int64_t>(p.pages->plain_pages * size - begin, 0, keys);
  const auto last = std::clamp<int64_t>(s.k_len / size * size - begin, first, keys);
  return {static_cast<int>(first), static_cast<int>(last)};
}

// One side of a page of K: the words, and what a code of each channel stands for.
template <PageFormat kFormat>
class KeyWords {
  static constexpr int kMostDim = 512;

 public:
  KeyWords(const uint8_t* codes, int64_t page_size, int dim)
      : words_(reinterpret_cast<const uint32_t*>(codes)), page_size_(page_size), dim_(dim) {
    const PageSide side = page_side(kFormat, false, page_size, dim);
    for (int c = 0; c < dim; c += kLanes<float>) {
      store(scale_ + c, load_float(reinterpret_cast<const Half*>(codes + side.scales) + c));
      store(zero_ + c, load_float(reinterpret_cast<const Half*>(codes + side.zeros) + c));
    }
  }

  // kVectors vectors of keys from `first` on, into a panel of `width` columns.
  template <int kVectors>
  void unpack(int64_t first, float* panel, int width) const {
    constexpr int kPlanes = planes_of(kFormat);
    constexpr int32_t kOffset = kFormat == PageFormat::kInt8 ? 128 : 0;  // int8 is stored signed
    const uint32_t* words = words_ + first;
    for (int c = 0; c < dim_; words += page_size_) {
      Vec<uint32_t> w[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) w[j] = load(words + j * kLanes<float>);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * kPlanes; ++i, ++c) {
        if (c >= dim_) return;
        const float scale = scale_[c], zero = zero_[c];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const Vec<int32_t> pair = plane<kFormat>(w[j], i / 2);
          const Vec<int32_t> code = i % 2 == 0 ? (pair << 16) >> 16 : pair >> 16;
          const auto value = __builtin_convertvector(code + kOffset, Vec<float>) * scale + zero;
          store(panel + int64_t{c} * width + j * kLanes<float>, value);
        }
      }
    }
  }

 private:
  const uint32_t* words_;
  int64_t page_size_;
  int dim_;
  float scale_[kMostDim + kLanes<float>];
  float zero_[kMostDim + kLanes<float>];
};

// Keys [codes.begin, codes.end) from `begin` on, all in pages of integers, into panels of `cols` columns. Each page's
// part begins and ends at a multiple of a vector's lanes, in the page and in the panels.
inline void unpack_keys(const AttentionParams& p, const Sequence& s, int64_t begin, Steps codes, float* panels,
                        int cols) {
  if (codes.begin == codes.end) return;
  const KvPages& pages = *p.pages;
  with_integers(pages.k_format, [&]<PageFormat kFormat>() {
    for (int at = codes.begin; at < codes.end;) {
      const int64_t first = (begin + at) % pages.page_size;
      const int end = at + static_cast<int>(std::min<int64_t>(pages.page_size - first, codes.end - at));
      const KeyWords<kFormat> words(page_of(p, s, false, begin + at), pages.page_size, p.head_dim);
      for (int64_t key = first; at < end;) {
        const PanelColumns<float> panel = in_panels(panels, p.head_dim, cols, at);
        const int count = std::min(panel.width - at % kPanel<float>, end - at);
        with_vectors(count / kLanes<float>,
                     [&]<int kVectors>() { words.template unpack<kVectors>(key, panel.data, panel.width); });
        at += count;
        key += count;
      }
    }
  });
}

}  // namespace lcore::cpu::LCORE_ISA
