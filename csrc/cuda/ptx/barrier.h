// Named barriers of a block: `threads`, a multiple of 32, is how many arrive in all. Barrier 0 is __syncthreads.
#pragma once

namespace lcore::cuda {

__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Goes on without waiting: for a producer that signals only.
__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace lcore::cuda
