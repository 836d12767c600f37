// csrc/cuda/ptx/shared.h for the emulator, where instructions take plain pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lcore::emulator {
std::byte* dynamic_shared();
uint32_t shared_window(const void* memory);
}  // namespace lcore::emulator

namespace lcore::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

// In the window of descriptors: dynamic shared memory first.
inline uint32_t shared_address(const void* memory) { return emulator::shared_window(memory); }

}  // namespace lcore::cuda
