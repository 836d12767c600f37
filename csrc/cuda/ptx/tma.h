// Boxes of a tensor (cuda/tensor_map.h) between global and shared memory, moved by the copy engine: one thread asks,
// and nobody waits. `at`: the box's first index in each dimension, innermost first; it may lie outside the tensor. A
// box in shared memory is aligned to 128 bytes, and to repeat_bytes(swizzle) where the pattern shall begin with it.
// sm_90.
#pragma once

#include <cuda.h>

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

// What the L2 cache should do with the lines: the encoded policies of createpolicy.
enum class L2 : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12f0000000000000,
  kEvictLast = 0x14f0000000000000,
};

// Brings the tensor map into the engine's cache.
__device__ inline void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Ends with mbarrier_complete(barrier, all bytes of the box), those outside the tensor included.
template <int kRank>
__device__ inline void tma_load(void* to, const CUtensorMap& map, uint64_t* barrier, const int (&at)[kRank],
                                L2 policy = L2::kNormal) {
  static_assert(kRank >= 2 && kRank <= 5);
#define LCORE_LOAD(rank, indices, ...)                                                                  \
  asm volatile("cp.async.bulk.tensor." rank                                                             \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"                              \
               ".L2::cache_hint [%0], [%1, {" indices "}], [%2], %3;" ::"r"(shared_address(to)),        \
               "l"(&map), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy)), "r"(at[0]), \
               "r"(at[1])__VA_ARGS__                                                                    \
               : "memory")
  if constexpr (kRank == 2) LCORE_LOAD("2d", "%4, %5");
  if constexpr (kRank == 3) LCORE_LOAD("3d", "%4, %5, %6", , "r"(at[2]));
  if constexpr (kRank == 4) LCORE_LOAD("4d", "%4, %5, %6, %7", , "r"(at[2]), "r"(at[3]));
  if constexpr (kRank == 5) LCORE_LOAD("5d", "%4, %5, %6, %7, %8", , "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef LCORE_LOAD
}

// Brings a box into the L2 cache.
template <int kRank>
__device__ inline void tma_prefetch(const CUtensorMap& map, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5);
#define LCORE_PREFETCH(rank, indices, ...)                                                                           \
  asm volatile("cp.async.bulk.prefetch.tensor." rank ".L2.global.tile [%0, {" indices "}];" ::"l"(&map), "r"(at[0]), \
               "r"(at[1])__VA_ARGS__                                                                                 \
               : "memory")
  if constexpr (kRank == 2) LCORE_PREFETCH("2d", "%1, %2");
  if constexpr (kRank == 3) LCORE_PREFETCH("3d", "%1, %2, %3", , "r"(at[2]));
  if constexpr (kRank == 4) LCORE_PREFETCH("4d", "%1, %2, %3, %4", , "r"(at[2]), "r"(at[3]));
  if constexpr (kRank == 5) LCORE_PREFETCH("5d", "%1, %2, %3, %4, %5", , "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef LCORE_PREFETCH
}

#define LCORE_STORE(what, how, rank, indices, ...)                                   \
  asm volatile(what "." rank ".global.shared::cta." how ".bulk_group [%1, {" indices \
                    "}], [%0];" ::"r"(shared_address(from)),                         \
               "l"(&map), "r"(at[0]), "r"(at[1])__VA_ARGS__                          \
               : "memory")
#define LCORE_STORES(what, how)                                                                       \
  if constexpr (kRank == 2) LCORE_STORE(what, how, "2d", "%2, %3");                                   \
  if constexpr (kRank == 3) LCORE_STORE(what, how, "3d", "%2, %3, %4", , "r"(at[2]));                 \
  if constexpr (kRank == 4) LCORE_STORE(what, how, "4d", "%2, %3, %4, %5", , "r"(at[2]), "r"(at[3])); \
  if constexpr (kRank == 5) LCORE_STORE(what, how, "5d", "%2, %3, %4, %5, %6", , "r"(at[2]), "r"(at[3]), "r"(at[4]))

// Belongs to the bulk group that the thread commits next (cuda/ptx/bulk.h).
template <int kRank>
__device__ inline void tma_store(const CUtensorMap& map, const int (&at)[kRank], const void* from) {
  static_assert(kRank >= 2 && kRank <= 5);
  LCORE_STORES("cp.async.bulk.tensor", "tile");
}

// The same, but adds to what is there, one element at a time and in no fixed order.
template <int kRank>
__device__ inline void tma_add(const CUtensorMap& map, const int (&at)[kRank], const void* from) {
  static_assert(kRank >= 2 && kRank <= 5);
  LCORE_STORES("cp.reduce.async.bulk.tensor", "add.tile");
}

#undef LCORE_STORES
#undef LCORE_STORE

}  // namespace lcore::cuda
