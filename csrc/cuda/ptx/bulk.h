// Contiguous bytes between global and shared memory, moved by the copy engine, and the groups in which its stores are
// waited for. Addresses and sizes are multiples of 16. sm_90.
#pragma once

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

// Shared memory that this thread has written, by whatever means but the engine, may afterwards be read by the copy
// engine and by wgmma: each writing thread calls it, before the barrier that lets the asking thread go on. An mbarrier
// that the engine shall complete counts as written memory.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory that the engine will read.
__device__ inline void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Ends with mbarrier_complete(barrier, bytes).
__device__ inline void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ inline void bulk_store(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}

// Adds to what is there, one element at a time and in no fixed order.
__device__ inline void bulk_add(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

// Makes one group of this thread's stores since the last commit.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but this thread's latest kPending groups have read their shared memory, which may then be written
// again.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all but the latest kPending groups have also written global memory.
template <int kPending>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lcore::cuda
