// Rounding upward, so that a computed sum is never below the exact one.
#pragma once

#include <cfenv>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace lcore::cpu::LCORE_ISA {

// While it lives, every operation of this thread rounds to the next number that is not smaller, and tiny numbers stay
// what they are. The compiler does not know: what shall be rounded so must stand in a function of its own that is not
// inlined.
class RoundUpward {
 public:
  RoundUpward(const RoundUpward&) = delete;
  RoundUpward& operator=(const RoundUpward&) = delete;
#if defined(__SSE__)
  RoundUpward() : saved_(_mm_getcsr()) {
    constexpr unsigned kMode = 0x6000, kFlush = 0x8040;  // rounding; results and operands that become zero
    _mm_setcsr((saved_ & ~(kMode | kFlush)) | _MM_ROUND_UP);
  }
  ~RoundUpward() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  RoundUpward() : saved_(std::fegetround()) { std::fesetround(FE_UPWARD); }
  ~RoundUpward() { std::fesetround(saved_); }

 private:
  int saved_;
#endif
};

}  // namespace lcore::cpu::LCORE_ISA
