// Vectors of one native register, through the compiler's vector types: one source for every instruction set. Only what
// the compiler does not turn into one instruction by itself is written with intrinsics (float16 conversion).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace lcore::cpu::LCORE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The integer type as wide as a floating type, for bit tricks on exponents.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using IVec = Vec<typename IntOf<T>::type>;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// x - 0 is x for every x, -0 included; x + 0 is not, and would not fold to a broadcast.
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
inline T reduce_max(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Pairwise, always in this order, so that a sum has one value.
template <class T>
inline T reduce_add(Vec<T> v) {
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// --- half types, widened to a register of float ---

using HalfBits = VectorOf<uint16_t, kVectorBytes / 2>::type;

inline HalfBits load_half_bits(const void* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

inline Vec<float> load_float(const BFloat16* p) {
  const auto wide = __builtin_convertvector(load_half_bits(p), Vec<uint32_t>) << 16;
  return reinterpret_cast<Vec<float>>(wide);
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
  const auto narrow = __builtin_convertvector(is_nan ? quiet : rounded, HalfBits);
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
