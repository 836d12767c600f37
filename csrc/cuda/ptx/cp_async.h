// Copies from global to shared memory that do not wait. Their bytes are there for the copying thread after
// cp_async_wait, for others after a barrier that follows it.
#pragma once

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

// Both addresses are aligned to kBytes. Of the kBytes, `filled` come from memory and the rest is zero: with 0 nothing
// is read, so `from` may then point anywhere.
template <int kBytes>
__device__ inline void cp_async(void* to, const void* from, int filled = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {  // past L1: a tile is read once a block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(filled)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(filled)
                 : "memory");
  }
}

// Makes one group of this thread's copies since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still on their way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lcore::cuda
