// csrc/cuda/ptx/bulk.h for the emulator.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

void fence_proxy_async();
inline void fence_proxy_async_global() {}
void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from, int bytes);
void bulk_add(float* to, const float* from, int bytes);
void bulk_commit();
void bulk_wait(int pending, bool only_read);

template <int kPending>
void bulk_wait_read() {
  bulk_wait(kPending, true);
}

template <int kPending>
void bulk_wait() {
  bulk_wait(kPending, false);
}

}  // namespace lcore::cuda
