// A square of vectors, transposed in registers.
#pragma once

#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// Within 16 bytes interleave instructions do a round; beyond, 16-byte blocks change places. log2(lanes) rounds of one
// shuffle a vector: the least there is.
template <class T, int kUnit>
struct InterleaveLow {  // units of kUnit lanes, alternately from the low half of each 16 bytes of a and of b
  static constexpr int kWithin = 16 / static_cast<int>(sizeof(T));
  static constexpr int of(int i) {
    const int block = i / kWithin * kWithin, unit = i % kWithin / kUnit;
    return block + unit / 2 * kUnit + i % kUnit + (unit % 2) * kLanes<T>;
  }
};
template <class T, int kUnit>
struct InterleaveHigh {
  static constexpr int of(int i) { return InterleaveLow<T, kUnit>::of(i) + InterleaveLow<T, kUnit>::kWithin / 2; }
};
template <class T, int kDistance>
struct SwapLow {  // blocks whose bit kDistance is set come from b, kDistance lanes lower
  static constexpr int of(int i) { return (i & kDistance) != 0 ? kLanes<T> + i - kDistance : i; }
};
template <class T, int kDistance>
struct SwapHigh {
  static constexpr int of(int i) { return (i & kDistance) != 0 ? kLanes<T> + i : i + kDistance; }
};

template <class T, int kDistance>
inline void swap_blocks(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (kDistance < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kDistance) != 0) continue;
      const Vec<T> low = shuffle<SwapLow<T, kDistance>, T>(v[i], v[i + kDistance]);
      v[i + kDistance] = shuffle<SwapHigh<T, kDistance>, T>(v[i], v[i + kDistance]);
      v[i] = low;
    }
    swap_blocks<T, 2 * kDistance>(v);
  }
}

template <class T>
inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
  constexpr int kWithin = 16 / static_cast<int>(sizeof(T));
#pragma GCC unroll 16
  for (int g = 0; g < kLanes<T>; g += kWithin) {  // kWithin x kWithin squares inside every 16 bytes
    if constexpr (kWithin == 2) {
      const Vec<T> low = shuffle<InterleaveLow<T, 1>, T>(v[g], v[g + 1]);
      v[g + 1] = shuffle<InterleaveHigh<T, 1>, T>(v[g], v[g + 1]);
      v[g] = low;
    } else {
      const Vec<T> ab_low = shuffle<InterleaveLow<T, 1>, T>(v[g], v[g + 1]);
      const Vec<T> ab_high = shuffle<InterleaveHigh<T, 1>, T>(v[g], v[g + 1]);
      const Vec<T> cd_low = shuffle<InterleaveLow<T, 1>, T>(v[g + 2], v[g + 3]);
      const Vec<T> cd_high = shuffle<InterleaveHigh<T, 1>, T>(v[g + 2], v[g + 3]);
      v[g] = shuffle<InterleaveLow<T, 2>, T>(ab_low, cd_low);
      v[g + 1] = shuffle<InterleaveHigh<T, 2>, T>(ab_low, cd_low);
      v[g + 2] = shuffle<InterleaveLow<T, 2>, T>(ab_high, cd_high);
      v[g + 3] = shuffle<InterleaveHigh<T, 2>, T>(ab_high, cd_high);
    }
  }
  swap_blocks<T, kWithin>(v);
}

}  // namespace lcore::cpu::LCORE_ISA
