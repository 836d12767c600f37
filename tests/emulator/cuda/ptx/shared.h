// csrc/cuda/ptx/shared.h for the emulator, where instructions take plain pointers.
#pragma once

#include <cstddef>

namespace lcore::emulator {
std::byte* dynamic_shared();
}

namespace lcore::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

}  // namespace lcore::cuda
