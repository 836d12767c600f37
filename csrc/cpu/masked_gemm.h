// C += A B (or diag(s) C + A B) where each row of A has weight only in a range of the summed values, and what it has no
// weight for must not reach it: 0 * NaN would. B comes packed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/pack_rows.h"

namespace lcore::cpu::LCORE_ISA {

inline constexpr int kMostColumns = 512;  // head_dim

// Whether `elements` (a multiple of a vector) of packed panels are all finite.
template <class In>
inline bool all_finite(const In* panels, int64_t elements) {
  constexpr int kLane = kLanes<In>;
  if constexpr (std::is_same_v<In, uint32_t>) {
    Vec<int32_t> bad{};
    for (int64_t i = 0; i < elements; i += kLane) {
      const Vec<In> bits = load(panels + i);
      bad |= ((bits & 0x7f800000u) == 0x7f800000u) | ((bits & 0x7f80u) == 0x7f80u);
    }
    return reduce<int32_t, kLanes<int32_t> / 2>(bad, [](auto a, auto b) { return a | b; }) == 0;
  } else {
    Vec<In> zero{};  // or NaN
    for (int64_t i = 0; i < elements; i += kLane) zero += load(panels + i) - load(panels + i);
    return reduce_add<In>(zero) == In{0};
  }
}

// While it lives, the halves of pairs that a range of values cuts off are zero in the packed panels.
class WithoutCutHalves {
 public:
  WithoutCutHalves(uint32_t* panels, int depth, int cols, Steps values) : panels_(panels), depth_(depth), cols_(cols) {
    if (values.begin % 2 != 0) hide(0, values.begin / 2, 0xffff0000u);
    if (values.end % 2 != 0) hide(1, values.end / 2, 0x0000ffffu);
  }
  ~WithoutCutHalves() {
    for (int side : {1, 0}) {
      if (steps_[side] < 0) continue;
      for_each_vector(panels_, depth_, cols_, steps_[side],
                      [&](uint32_t* p, int c) { store(p, load(&saved_[side][c])); });
    }
  }
  WithoutCutHalves(const WithoutCutHalves&) = delete;
  WithoutCutHalves& operator=(const WithoutCutHalves&) = delete;

 private:
  void hide(int side, int step, uint32_t keep) {
    steps_[side] = step;
    for_each_vector(panels_, depth_, cols_, step, [&](uint32_t* p, int c) {
      store(&saved_[side][c], load(p));
      store(p, load(p) & keep);
    });
  }
  uint32_t* panels_;
  int depth_;
  int cols_;
  int steps_[2] = {-1, -1};
  std::array<uint32_t, kMostColumns> saved_[2];
};

// b packs `values` values (steps of kPair) of `cols` columns; taken(r, count) is the range of values that any of the
// rows [r, r + count) takes. A tile's rows take the union of their ranges, which is exact while B is finite; else they
// go one by one.
template <class M, Accumulate kMode, class Taken>
inline void gemm_masked(const MatrixA<typename M::In>& a, typename M::In* b, int values, bool finite,
                        typename M::Out* c, int64_t ldc, int rows, int cols, const Taken& taken,
                        const typename M::Out* row_scale = nullptr) {
  const int depth = div_up(values, M::kPair);
  const int step = finite ? kTileRows : 1;
  for (int r = 0; r < rows; r += step) {
    const int count = std::min(step, rows - r);
    const Steps range = taken(r, count);
    if (range.begin >= range.end) continue;
    const auto multiply = [&] {
      gemm<M, kMode>({a.data + r * a.row, a.row, a.col}, b, depth,
                     {range.begin / M::kPair, div_up(range.end, M::kPair)}, c + r * ldc, ldc, count, cols,
                     row_scale == nullptr ? nullptr : row_scale + r);
    };
    if constexpr (M::kPair == 2) {
      if (!finite) {
        const WithoutCutHalves guard(b, depth, cols, range);
        multiply();
        continue;
      }
    }
    multiply();
  }
}

}  // namespace lcore::cpu::LCORE_ISA
