// Products of 16-bit integers in pairs: what the codes of a page are multiplied with. Exact in 32 bits.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/page_format.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

// sum + a.low * b.low + a.high * b.high in every lane.
inline Vec<int32_t> multiply_pairs(Vec<int32_t> a, Vec<int32_t> b, Vec<int32_t> sum) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Vec<int32_t>>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
  return sum +
         reinterpret_cast<Vec<int32_t>>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum +
         reinterpret_cast<Vec<int32_t>>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum +
         reinterpret_cast<Vec<int32_t>>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return sum + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
#endif
}

// Ends what the compiler may regroup of an integer sum: it would add the planes of a word to each other first, and keep
// their products in memory meanwhile.
inline void in_register([[maybe_unused]] Vec<int32_t>& sum) {
#if defined(__SSE2__)
  __asm__("" : "+v"(sum));  // any vector register, the upper half of 32 too
#endif
}

// Plane i of words of codes, as pairs of 16-bit integers.
template <PageFormat kFormat>
inline Vec<int32_t> plane(Vec<uint32_t> words, int i) {
  using Halves = typename VectorOf<int16_t>::type;
  constexpr int kBits = bits_of(kFormat);
  if constexpr (kFormat == PageFormat::kInt8) {
    const auto halves = reinterpret_cast<Halves>(words);
    return reinterpret_cast<Vec<int32_t>>(i == 0 ? (halves << 8) >> 8 : halves >> 8);
  } else {
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
    return reinterpret_cast<Vec<int32_t>>((words >> (kBits * i)) & kMask);
  }
}

// What is added to a code as stored to give the code: int8 is signed.
template <PageFormat kFormat>
inline constexpr float kCodeOffset = kFormat == PageFormat::kInt8 ? 128.0f : 0.0f;

}  // namespace lcore::cpu::LCORE_ISA
