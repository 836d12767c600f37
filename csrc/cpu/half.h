// bfloat16 and float16 as vectors of bits, and widened to a register of float.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "cpu/simd.h"

namespace lcore::cpu::LCORE_ISA {

using HalfBits = VectorOf<uint16_t, kVectorBytes / 2>::type;

inline HalfBits load_half_bits(const void* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

// 16 bits to 32 with zeros above, and back without them. The compiler takes five instructions for what AVX2 does in
// one.
inline Vec<uint32_t> widen_bits(HalfBits bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<Vec<uint32_t>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, Vec<uint32_t>);
#endif
}
inline HalfBits narrow_bits(Vec<uint32_t> bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
  return reinterpret_cast<HalfBits>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}

inline Vec<float> load_float(const BFloat16* p) {
  return reinterpret_cast<Vec<float>>(widen_bits(load_half_bits(p)) << 16);
}

inline Vec<float> load_float(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(load_half_bits(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(load_half_bits(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store_half(BFloat16* p, Vec<float> v) {
  const auto bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const HalfBits narrow = narrow_bits(is_nan ? quiet : rounded);
  std::memcpy(p, &narrow, sizeof(narrow));
}

inline void store_half(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  const auto bits = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof(bits));
#elif defined(__F16C__)
  const auto bits = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof(bits));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_half(v[i]);
#endif
}

}  // namespace lcore::cpu::LCORE_ISA
