// csrc/cuda/ptx/ldmatrix.h for the emulator.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.h"

namespace lcore::emulator {
void load_matrices(uint32_t* out, const void* row, int count, bool transposed);
}

namespace lcore::cuda {

template <int kCount>
void ldmatrix(uint32_t (&out)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::load_matrices(out, row, kCount, false);
}

template <int kCount>
void ldmatrix_trans(uint32_t (&out)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::load_matrices(out, row, kCount, true);
}

}  // namespace lcore::cuda
