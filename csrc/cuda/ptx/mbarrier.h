// Barriers that live in shared memory and count phases. A phase ends when `count` arrivals and all announced bytes have
// come; what the arriving threads did before is then seen by those who wait.
#pragma once

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

// By one thread; a barrier of the block must follow before others use it.
__device__ inline void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Until the phase of this parity has ended: 0 for the first phase, 1 for the second, 0 for the third.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define LCORE_WAIT "try_wait"  // the hardware lets the thread sleep for a while
#else
#define LCORE_WAIT "test_wait"
#endif
  uint32_t ended;
  do {
    asm volatile("{ .reg .pred p; mbarrier." LCORE_WAIT ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (ended == 0);
#undef LCORE_WAIT
}

// Arrives and announces bytes that an asynchronous copy will bring in this phase. sm_90 and later.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// What an asynchronous copy does when it has brought bytes. sm_90 and later.
__device__ inline void mbarrier_complete(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

}  // namespace lcore::cuda
