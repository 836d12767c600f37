// csrc/cuda/ptx/stmatrix.h for the emulator.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.h"

namespace lcore::emulator {
void store_matrices(void* row, const uint32_t* in, int count, bool transposed);
}

namespace lcore::cuda {

template <int kCount>
void stmatrix(void* row, const uint32_t (&in)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::store_matrices(row, in, kCount, false);
}

template <int kCount>
void stmatrix_trans(void* row, const uint32_t (&in)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::store_matrices(row, in, kCount, true);
}

}  // namespace lcore::cuda
