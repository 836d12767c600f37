// What a matrix product multiplies. Widened<T>: elements of T, one multiply-add a step. BF16Pairs: two bfloat16 values
// that are neighbours along the summed dimension lie in 32 bits and are multiplied and added by one instruction, so a
// step covers two of them; sums are float.
#pragma once

#include <cstdint>

#include "cpu/half.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
struct Widened {
  using In = T;
  using Out = T;
  static constexpr int kPair = 1;  // values of the summed dimension a step
  static Vec<T> step(Vec<T> a, Vec<T> b, Vec<T> sum) { return a * b + sum; }
};

struct BF16Pairs {
  using In = uint32_t;
  using Out = float;
  static constexpr int kPair = 2;
  static Vec<float> step(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> sum) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else  // the instruction's definition, odd half first: what an emulating build runs
    const auto odd = [](Vec<uint32_t> x) { return reinterpret_cast<Vec<float>>(x & 0xffff0000u); };
    const auto even = [](Vec<uint32_t> x) { return reinterpret_cast<Vec<float>>(x << 16); };
    return even(a) * even(b) + (odd(a) * odd(b) + sum);
#endif
  }
};

// Weights of a row as the A of a product: in T itself, or rounded to nearest in pairs (denormal ones may become zero).
template <class T>
inline void store_weights(T* p, Vec<T> v) {
  store(p, v);
}
inline void store_weights(uint32_t* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  std::memcpy(p, &bits, sizeof(bits));
#else
  store_half(reinterpret_cast<BFloat16*>(p), v);
#endif
}

// Rounded to nearest bfloat16, which stands in the upper halves; the lower ones are 0.
inline Vec<uint32_t> round_bits(Vec<float> v) {
  const auto bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto quiet = bits | 0x400000u;
  return ((bits & 0x7fffffffu) > 0x7f800000u ? quiet : bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// Pairs of two rows: the first in the lower halves.
inline Vec<uint32_t> pair_up(Vec<float> low, Vec<float> high) { return (round_bits(low) >> 16) | round_bits(high); }

#if defined(__AVX512BF16__) || defined(LCORE_EMULATE_BF16)
inline constexpr bool kHasBF16Pairs = true;
#else
inline constexpr bool kHasBF16Pairs = false;
#endif

}  // namespace lcore::cpu::LCORE_ISA
