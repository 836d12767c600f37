// Shared memory: the part whose size is known at launch, and the addresses that instructions take.
#pragma once

#include <cstdint>

namespace lcore::cuda {

// The block's dynamic shared memory, aligned for bulk copies and swizzles.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char lcore_dynamic_shared[];
  return reinterpret_cast<T*>(lcore_dynamic_shared);
}

__device__ inline uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

}  // namespace lcore::cuda
