// csrc/cuda/ptx/mbarrier.h for the emulator.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, int parity);
void mbarrier_arrive_expect(uint64_t* barrier, int bytes);
void mbarrier_complete(uint64_t* barrier, int bytes);

}  // namespace lcore::cuda
