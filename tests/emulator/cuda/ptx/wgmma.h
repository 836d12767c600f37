// csrc/cuda/ptx/wgmma.h for the emulator.
#pragma once

#include "cuda/descriptor.h"
#include "cuda/product.h"
#include "products.h"

namespace lcore::emulator {
void wgmma(uint32_t* sum, const uint32_t* a, const Issued& issued);
}

namespace lcore::cuda {

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

template <int kPending>
void wgmma_wait() {
  wgmma_wait(kPending);
}

template <int kRegisters>
inline constexpr bool is_wgmma_size = kRegisters == 4 || (kRegisters >= 8 && kRegisters <= 128 && kRegisters % 8 == 0);

template <Product kType, Major kA = Major::kK, Major kB = Major::kK, int kRegisters>
void wgmma(SumOf<kType> (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<kRegisters>);
  static_assert(kType <= Product::kFp16 || (kA == Major::kK && kB == Major::kK));
  emulator::wgmma(reinterpret_cast<uint32_t*>(d), nullptr, {kType, 2 * kRegisters, kA, kB, false, accumulate, a, b});
}

template <Product kType, Major kB = Major::kK, int kRegisters>
void wgmma(SumOf<kType> (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(is_wgmma_size<kRegisters>);
  static_assert(kType <= Product::kFp16 || kB == Major::kK);
  emulator::wgmma(reinterpret_cast<uint32_t*>(d), a, {kType, 2 * kRegisters, Major::kK, kB, true, accumulate, 0, b});
}

}  // namespace lcore::cuda
