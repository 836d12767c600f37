// csrc/cuda/ptx/cp_async.h for the emulator.
#pragma once

#include "cuda/ptx/shared.h"

namespace lcore::emulator {
void cp_async(void* to, const void* from, int bytes, int filled);
void cp_async_commit();
void cp_async_wait(int pending);
}  // namespace lcore::emulator

namespace lcore::cuda {

template <int kBytes>
void cp_async(void* to, const void* from, int filled = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::cp_async(to, from, kBytes, filled);
}

inline void cp_async_commit() { emulator::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

}  // namespace lcore::cuda
