// csrc/cuda/ptx/tma.h for the emulator.
#pragma once

#include <cuda.h>

#include "cuda/ptx/shared.h"

namespace lcore::emulator {
void tensor_load(void* to, const CUtensorMap& map, uint64_t* barrier, const int* at, int rank);
void tensor_store(const CUtensorMap& map, const int* at, int rank, const void* from, bool add);
void tensor_prefetch(const CUtensorMap& map, int rank);
}  // namespace lcore::emulator

namespace lcore::cuda {

enum class L2 : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12f0000000000000,
  kEvictLast = 0x14f0000000000000,
};

inline void tma_prefetch_map(const CUtensorMap& map) { emulator::tensor_prefetch(map, 0); }

template <int kRank>
void tma_load(void* to, const CUtensorMap& map, uint64_t* barrier, const int (&at)[kRank], L2 = L2::kNormal) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::tensor_load(to, map, barrier, at, kRank);
}

template <int kRank>
void tma_prefetch(const CUtensorMap& map, const int (&)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::tensor_prefetch(map, kRank);
}

template <int kRank>
void tma_store(const CUtensorMap& map, const int (&at)[kRank], const void* from) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::tensor_store(map, at, kRank, from, false);
}

template <int kRank>
void tma_add(const CUtensorMap& map, const int (&at)[kRank], const void* from) {
  static_assert(kRank >= 2 && kRank <= 5);
  emulator::tensor_store(map, at, kRank, from, true);
}

}  // namespace lcore::cuda
