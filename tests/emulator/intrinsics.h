// Arithmetic that CUDA has and C++ lacks, and atomics.
#pragma once

#include <math.h>  // CUDA has isnan and the like without std::

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lcore::emulator {
// Checked as an atomic access of shared or global memory.
void check_atomic(void* memory, size_t bytes);
}  // namespace lcore::emulator

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
template <class F>
float rounded_up(F&& f) {
  const int before = std::fegetround();
  std::fesetround(FE_UPWARD);
  const volatile float x = f();  // before the mode changes back
  std::fesetround(before);
  return x;
}
inline float __fmaf_ru(float x, float y, float z) {
  const volatile float a = x, b = y, c = z;  // computed here, not where the mode is another
  return rounded_up([&] { return std::fma(a, b, c); });
}
inline float __fadd_ru(float x, float y) {
  const volatile float a = x, b = y;
  return rounded_up([&] { return a + b; });
}
inline float __double2float_ru(double x) {
  const volatile double a = x;
  return rounded_up([&] { return static_cast<float>(a); });
}
inline float __saturatef(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }
inline void sincospi(double x, double* sine, double* cosine) {
  const double angle = (x - 2 * std::nearbyint(x / 2)) * 3.14159265358979323846;
  *sine = std::sin(angle);
  *cosine = std::cos(angle);
}
inline void sincospif(float x, float* sine, float* cosine) {
  double s, c;
  sincospi(static_cast<double>(x), &s, &c);
  *sine = static_cast<float>(s);
  *cosine = static_cast<float>(c);
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xf;
    const unsigned byte = both >> 8 * (pick & 7) & 0xff;
    out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return out;
}

namespace lcore::emulator {
template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace lcore::emulator

inline float __int_as_float(int x) { return lcore::emulator::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return lcore::emulator::same_bits<float>(x); }
inline int __float_as_int(float x) { return lcore::emulator::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return lcore::emulator::same_bits<unsigned>(x); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

template <class T>
constexpr T min(T x, T y) {
  return y < x ? y : x;
}
template <class T>
constexpr T max(T x, T y) {
  return x < y ? y : x;
}

// One compare-and-swap loop for every type and operation: blocks run on several cores.
namespace lcore::emulator {
template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic_change(T* p, F&& change) {
  check_atomic(p, sizeof(T));
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = change(old);
  while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}
}  // namespace lcore::emulator

// As CUDA's overloads, the operand converts to the type of the object.
#define LCORE_ATOMIC(name, expression)                                                                            \
  template <class T>                                                                                              \
  __attribute__((no_sanitize("thread"))) T name(T* p, std::type_identity_t<T> x) {                                \
    return lcore::emulator::atomic_change(p, [=]([[maybe_unused]] T old) { return static_cast<T>(expression); }); \
  }
LCORE_ATOMIC(atomicAdd, old + x)
LCORE_ATOMIC(atomicSub, old - x)
LCORE_ATOMIC(atomicMin, old < x ? old : x)
LCORE_ATOMIC(atomicMax, old > x ? old : x)
LCORE_ATOMIC(atomicAnd, old& x)
LCORE_ATOMIC(atomicOr, old | x)
LCORE_ATOMIC(atomicXor, old ^ x)
LCORE_ATOMIC(atomicExch, x)
LCORE_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
#undef LCORE_ATOMIC

template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return lcore::emulator::atomic_change(p, [=](T old) { return old == expected ? x : old; });
}
