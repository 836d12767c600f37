// The CUDA language for g++, included before every kernel source: what a thread asks about itself, barriers and warp
// collectives. Arithmetic and atomics are in intrinsics.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "intrinsics.h"
#include "warp.h"

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static thread_local  // a block stays on one core
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::lcore::emulator::thread_index())
#define blockIdx (::lcore::emulator::block_index())
#define blockDim (::lcore::emulator::block_dim())
#define gridDim (::lcore::emulator::grid_dim())

namespace lcore::emulator {

uint3 thread_index();
uint3 block_index();
uint3 block_dim();
uint3 grid_dim();
uint32_t active_mask();
int synchronize(int barrier, int threads, bool vote);  // threads 0: the whole block; how many voted
void arrive(int barrier, int threads);
uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane);  // source_lane outside 0..31: its own
uint32_t ballot(uint32_t mask, bool vote);
uint32_t match(uint32_t mask, uint64_t bits);
enum class Reduction : int { kAdd, kMin, kMax, kAnd, kOr, kXor };
int64_t reduce(uint32_t mask, int64_t value, Reduction how);
int lane();

template <class T>
T shuffle_any(uint32_t mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// `source` if it lies in the lane's own segment of `width` lanes, otherwise the lane itself.
inline int within(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }

}  // namespace lcore::emulator

inline void __syncthreads() { lcore::emulator::synchronize(0, 0, false); }
inline int __syncthreads_count(int p) { return lcore::emulator::synchronize(0, 0, p != 0); }
inline int __syncthreads_or(int p) { return __syncthreads_count(p) > 0; }
inline int __syncthreads_and(int p) { return __syncthreads_count(!p) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffff) { lcore::emulator::ballot(mask, false); }
inline unsigned __activemask() { return lcore::emulator::active_mask(); }
inline unsigned __ballot_sync(unsigned mask, int p) { return lcore::emulator::ballot(mask, p != 0); }
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return lcore::emulator::match(mask, bits);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return lcore::emulator::shuffle_any(mask, value, lcore::emulator::lane() / width * width + source % width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lcore::emulator::lane() - static_cast<int>(delta);
  return lcore::emulator::shuffle_any(mask, value, lcore::emulator::within(source, width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = lcore::emulator::lane() + static_cast<int>(delta);
  return lcore::emulator::shuffle_any(mask, value, lcore::emulator::within(source, width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const int source = lcore::emulator::lane() ^ with;
  // Unlike the others, it may read a lower segment.
  return lcore::emulator::shuffle_any(
      mask, value, source / width <= lcore::emulator::lane() / width ? source : lcore::emulator::lane());
}

#define LCORE_REDUCE(name, T, how)                                                                \
  inline T __reduce_##name##_sync(unsigned mask, T value) {                                       \
    return static_cast<T>(lcore::emulator::reduce(mask, value, lcore::emulator::Reduction::how)); \
  }
LCORE_REDUCE(add, int, kAdd)
LCORE_REDUCE(add, unsigned, kAdd)
LCORE_REDUCE(min, int, kMin)
LCORE_REDUCE(min, unsigned, kMin)
LCORE_REDUCE(max, int, kMax)
LCORE_REDUCE(max, unsigned, kMax)
LCORE_REDUCE(and, unsigned, kAnd)
LCORE_REDUCE(or, unsigned, kOr)
LCORE_REDUCE(xor, unsigned, kXor)
#undef LCORE_REDUCE
