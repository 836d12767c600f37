// Products of a warpgroup, d (+)= a b: a is 64 x k, b is k x N, a step of k is 32 bytes. All four warps ask, and nobody
// waits:
//   wgmma_fence(); wgmma<...>(...) for each step; wgmma_commit(); ...; wgmma_wait<0>();
// Between the first product and the wait that covers it, neither d nor an `a` in registers may be touched. Warp w keeps
// rows 16 w and on; with g = lane / 4 and t = lane % 4, d[i] is row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t +
// i % 2. sm_90a.
#pragma once

#include "cuda/descriptor.h"
#include "cuda/product.h"
#include "cuda/ptx/wgmma_registers.inc"

namespace lcore::cuda {

// Before the first product, and again after registers that products use have been touched.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one group of the products since the last commit.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the latest groups are still being computed.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// `accumulate` false: d = a b. Both operands by descriptors, or `a` in registers with the fragments of mma.sync: with e
// elements a register, a[r] is row 16 w + g + 8 (r % 2), columns e t + 4 e (r / 2) and on. Sizes of N: 8, 16, 32, 48,
// ... 256.
#define LCORE_ISSUE(shape, c, N, a_text, b_number, add_number, scales, ...)                                  \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #add_number ", 0; wgmma.mma_async.sync.aligned." shape \
               " {" LCORE_TEXT_##N "}, " a_text ", %" #b_number ", add" scales "; }"                         \
               : LCORE_REGISTERS_##N(c)                                                                      \
               : __VA_ARGS__)
#define LCORE_SHARED(shape, c, N, i0, i1, i2, scales, ...) \
  LCORE_ISSUE("m64n" #N shape, c, N, "%" #i0, i1, i2, scales, "l"(a), "l"(b), "r"(int{accumulate})__VA_ARGS__)
#define LCORE_IN_REGISTERS(shape, c, N, i0, i1, i2, i3, i4, i5, scales, ...)                                           \
  LCORE_ISSUE("m64n" #N shape, c, N, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}", i4, i5, scales, "r"(a[0]), "r"(a[1]), \
              "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate})__VA_ARGS__)
#define LCORE_WGMMA(N, i0, i1, i2, i3, i4, i5, i6)                                                                 \
  template <Product kType, Major kA = Major::kK, Major kB = Major::kK>                                             \
  __device__ __forceinline__ void wgmma(SumOf<kType>(&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {        \
    constexpr int kAt = static_cast<int>(kA), kBt = static_cast<int>(kB);                                          \
    static_assert(kType <= Product::kFp16 || (kAt == 0 && kBt == 0), "only 16-bit types may be major in m or n");  \
    if constexpr (kType == Product::kBf16)                                                                         \
      LCORE_SHARED("k16.f32.bf16.bf16", "+f", N, i0, i1, i2, ", 1, 1, %" #i3 ", %" #i4, , "n"(kAt), "n"(kBt));     \
    if constexpr (kType == Product::kFp16)                                                                         \
      LCORE_SHARED("k16.f32.f16.f16", "+f", N, i0, i1, i2, ", 1, 1, %" #i3 ", %" #i4, , "n"(kAt), "n"(kBt));       \
    if constexpr (kType == Product::kTf32) LCORE_SHARED("k8.f32.tf32.tf32", "+f", N, i0, i1, i2, ", 1, 1");        \
    if constexpr (kType == Product::kE4m3) LCORE_SHARED("k32.f32.e4m3.e4m3", "+f", N, i0, i1, i2, ", 1, 1");       \
    if constexpr (kType == Product::kS8) LCORE_SHARED("k32.s32.s8.s8", "+r", N, i0, i1, i2, "");                   \
  }                                                                                                                \
  template <Product kType, Major kB = Major::kK>                                                                   \
  __device__ __forceinline__ void wgmma(SumOf<kType>(&d)[N / 2], const uint32_t (&a)[4], uint64_t b,               \
                                        bool accumulate) {                                                         \
    constexpr int kBt = static_cast<int>(kB);                                                                      \
    static_assert(kType <= Product::kFp16 || kBt == 0, "only 16-bit types may be major in n");                     \
    if constexpr (kType == Product::kBf16)                                                                         \
      LCORE_IN_REGISTERS("k16.f32.bf16.bf16", "+f", N, i0, i1, i2, i3, i4, i5, ", 1, 1, %" #i6, , "n"(kBt));       \
    if constexpr (kType == Product::kFp16)                                                                         \
      LCORE_IN_REGISTERS("k16.f32.f16.f16", "+f", N, i0, i1, i2, i3, i4, i5, ", 1, 1, %" #i6, , "n"(kBt));         \
    if constexpr (kType == Product::kTf32)                                                                         \
      LCORE_IN_REGISTERS("k8.f32.tf32.tf32", "+f", N, i0, i1, i2, i3, i4, i5, ", 1, 1");                           \
    if constexpr (kType == Product::kE4m3)                                                                         \
      LCORE_IN_REGISTERS("k32.f32.e4m3.e4m3", "+f", N, i0, i1, i2, i3, i4, i5, ", 1, 1");                          \
    if constexpr (kType == Product::kS8) LCORE_IN_REGISTERS("k32.s32.s8.s8", "+r", N, i0, i1, i2, i3, i4, i5, ""); \
  }

// N, and the seven numbers that follow its registers.
LCORE_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
LCORE_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
LCORE_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
LCORE_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
LCORE_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
LCORE_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
LCORE_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
LCORE_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
LCORE_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
LCORE_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
LCORE_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
LCORE_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
LCORE_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
LCORE_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
LCORE_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
LCORE_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
LCORE_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef LCORE_WGMMA
#undef LCORE_IN_REGISTERS
#undef LCORE_SHARED
#undef LCORE_ISSUE

}  // namespace lcore::cuda
