// Signed Hadamard transform (QuaRot, Ashkboos et al. 2024): y = H S x / sqrt(b) in blocks of b channels, the largest
// power of two that divides dim; inverse S H y / sqrt(b). A block lies in the registers of 1 to 32 neighbouring lanes,
// kEach channels in each: log2 kEach passes inside of a lane, the others by shuffles, no shared memory. Each value is
// read and written once, 16 bytes at a time where rows are aligned. Bound by memory.
#include "core/hadamard.h"

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/packs.cuh"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 256;

struct HadamardTiles {
  HadamardParams p;
  int block;  // channels: b
  bool packed;
};

// The signs of csrc/cpu/hadamard/hadamard.cpp: the lowest bit of MurmurHash3's finalizer.
__device__ bool is_negative(uint32_t channel) {
  uint32_t h = channel + 1;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return ((h ^ (h >> 16)) & 1u) != 0;
}

template <class T, int kEach>
__global__ void __launch_bounds__(kThreads) hadamard_kernel(HadamardTiles tiles) {
  using X = Wide<T>;
  const HadamardParams& p = tiles.p;
  const int lanes = tiles.block / kEach, pieces = p.dim / tiles.block;
  const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;  // a block of b channels
  const int lane = threadIdx.x % lanes;
  const bool real = item < p.batch * p.seq * p.heads * pieces;  // all lanes take part in the shuffles
  const int64_t row = item / pieces, head = row % p.heads, seq = row / p.heads % p.seq, batch = row / p.heads / p.seq;
  const int c = static_cast<int>(item % pieces) * tiles.block + lane * kEach;
  X x[kEach] = {};
  if (real) {
    const T* from = static_cast<const T*>(p.x.data) + batch * p.x.batch + seq * p.x.seq + head * p.x.head;
    load_row(from + c * p.x.dim, p.x.dim, tiles.packed, x);
  }
  const X factor = X{1} / sqrt(static_cast<X>(tiles.block));
  const auto sign = [&] {
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] *= is_negative(c + i) ? -factor : factor;
  };
  if (!p.inverse) sign();
#pragma unroll
  for (int half = 1; half < kEach; half *= 2) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((i & half) != 0) continue;
      const X a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
  for (int step = 1; step < lanes; step *= 2) {
    const bool second = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const X other = __shfl_xor_sync(kAllLanes, x[i], step);
      x[i] = second ? other - x[i] : x[i] + other;
    }
  }
  if (p.inverse) sign();
  if (real) store_row(static_cast<T*>(p.out) + row * p.dim + c, tiles.packed, x);
}

template <class T, int kEach>
void run(const HadamardTiles& tiles, Stream& stream) {
  const HadamardParams& p = tiles.p;
  const int64_t threads = p.batch * p.seq * p.heads * (p.dim / kEach);
  launch(hadamard_kernel<T, kEach>, dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), dim3(kThreads), 0,
         stream, tiles);
}

}  // namespace

void hadamard(const HadamardParams& p, Stream& stream) {
  if (p.batch * p.seq * p.heads * p.dim == 0) return;
  const int block = p.dim & -p.dim;
  if (block > 1024) {
    throw std::runtime_error("lcore.hadamard: the CUDA kernel takes blocks of up to 1024 channels, got dim " +
                             std::to_string(p.dim) + "; use the CPU");
  }
  for_float_type(p.type, "hadamard", [&](auto zero) {
    using T = decltype(zero);
    const bool packed = is_aligned(p.x, p.type) && is_aligned(p.out) && p.dim % kPack<T> == 0;
    const HadamardTiles tiles{p, block, packed};
    if (block <= 32) return run<T, 1>(tiles, stream);
    if (block <= 256) return run<T, 8>(tiles, stream);
    run<T, 32>(tiles, stream);
  });
}

}  // namespace lcore::cuda::generic
