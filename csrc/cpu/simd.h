// Vectors of one native register, through the compiler's vector types: one source for every instruction set. Only what
// the compiler does not turn into one instruction by itself is written with intrinsics (float16 conversion).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE__)
#include <immintrin.h>
#endif

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

// The integer type as wide as T: for bit tricks on exponents, and for the indices of a shuffle.
template <class T>
struct IntOf {
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

// 0, 1, 2, ...
template <class T>
inline Vec<T> iota() {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// x where it lies in [low, high], else the nearer end; a NaN stays: of two operands these instructions return the
// second one then. The compiler makes a comparison and a blend of the operator.
inline Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 raised = _mm512_max_ps(_mm512_set1_ps(low), reinterpret_cast<__m512>(x));
  return reinterpret_cast<Vec<float>>(_mm512_min_ps(_mm512_set1_ps(high), raised));
#elif defined(__AVX2__)
  const __m256 raised = _mm256_max_ps(_mm256_set1_ps(low), reinterpret_cast<__m256>(x));
  return reinterpret_cast<Vec<float>>(_mm256_min_ps(_mm256_set1_ps(high), raised));
#elif defined(__SSE__)
  const __m128 raised = _mm_max_ps(_mm_set1_ps(low), reinterpret_cast<__m128>(x));
  return reinterpret_cast<Vec<float>>(_mm_min_ps(_mm_set1_ps(high), raised));
#else
  const Vec<float> raised = low > x ? splat(low) : x;
  return high < raised ? splat(high) : raised;
#endif
}

// Lanes of a and b by index, b's counted from kLanes<T>: kAt(i) for every lane i, folded to one constant.
template <class T, class At, size_t... kI>
inline Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b, At, std::index_sequence<kI...>) {
  const IVec<T> lanes = {At::of(static_cast<int>(kI))...};
  return __builtin_shuffle(a, b, lanes);
}
template <class At, class T>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle_lanes<T>(a, b, At{}, std::make_index_sequence<kLanes<T>>{});
}

// Folds the upper half of the lanes onto the lower, again and again: pairwise, always in this order, so that a sum has
// one value.
template <class T, int kHalf, class Fold>
inline T reduce(Vec<T> v, const Fold& fold) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    struct Upper {
      static constexpr int of(int i) { return (i + kHalf) % kLanes<T>; }
    };
    return reduce<T, kHalf / 2>(fold(v, shuffle<Upper, T>(v, v)), fold);
  }
}

template <class T>
inline T reduce_max(Vec<T> v) {
  return reduce<T, kLanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
}

template <class T>
inline T reduce_add(Vec<T> v) {
  return reduce<T, kLanes<T> / 2>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

}  // namespace lcore::cpu::LCORE_ISA
