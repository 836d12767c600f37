// c = a bT of bfloat16 as Hopper wants it: a warpgroup whose one thread loads tiles, two that multiply them, a ring of
// stages between them, results through shared memory and the copy engine. Blocks take tiles in turn.
#include <cuda_bf16.h>

#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/bulk.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/registers.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tensor_map.h"
#include "entry.h"

using namespace lcore;
using namespace lcore::cuda;

enum PipelineMistake { kNone, kNoEmptyWait, kReleasesEarly, kOneStageBehind, kNoFence };

struct Pipeline {
  CUtensorMap a, b, c;  // (m, k), (n, k), (m, n); boxes of 64 x 64 elements
  int m, n, k;
  PipelineMistake mistake;
};

constexpr int kTile = 128, kDepth = 64, kStages = 3, kPanel = 64 * 128;  // bytes of 64 swizzled rows
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);

struct Storage {
  unsigned char a[kStages][kTile / 64][kPanel], b[kStages][kTile / 64][kPanel], c[kConsumers][kTile / 64][kPanel];
  uint64_t full[kStages], empty[kStages];
};

struct Place {  // in the ring
  int stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ void produce(const Pipeline& p, Storage& s) {
  Place at;
  const int tiles_n = p.n / kTile, tiles = p.m / kTile * tiles_n;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row = tile / tiles_n * kTile, column = tile % tiles_n * kTile;
    for (int k = 0; k < p.k; k += kDepth) {
      if (p.mistake != kNoEmptyWait) mbarrier_wait(&s.empty[at.stage], at.phase ^ 1);
      mbarrier_arrive_expect(&s.full[at.stage], 4 * kPanel);
      for (int half = 0; half < 2; ++half) {
        tma_load(s.a[at.stage][half], p.a, &s.full[at.stage], {k, row + 64 * half});
        tma_load(s.b[at.stage][half], p.b, &s.full[at.stage], {k, column + 64 * half}, L2::kEvictLast);
      }
      at.next();
    }
  }
}

// Consumer w multiplies rows 64 w and on of the tile.
__device__ void consume(const Pipeline& p, Storage& s, int w) {
  Place at;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int tiles_n = p.n / kTile, tiles = p.m / kTile * tiles_n;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float d[kTile / 2];
    for (int k = 0; k < p.k; k += kDepth) {
      mbarrier_wait(&s.full[at.stage], at.phase);
      const int stage = p.mistake == kOneStageBehind ? (at.stage + 1) % kStages : at.stage;
      wgmma_fence();
      for (int step = 0; step < kDepth / 16; ++step) {
        wgmma<Product::kBf16>(d, advance(k_major(s.a[stage][w], Swizzle::k128), 32 * step),
                              advance(k_major(s.b[stage][0], Swizzle::k128), 32 * step), k + step > 0);
      }
      wgmma_commit();
      if (p.mistake != kReleasesEarly) wgmma_wait<0>();
      if (threadIdx.x % 128 == 96) mbarrier_arrive(&s.empty[at.stage]);  // for the warpgroup: its products are over
      if (p.mistake == kReleasesEarly) wgmma_wait<0>();
      at.next();
    }
    if (threadIdx.x % 128 == 0) bulk_wait_read<0>();  // the last tile has left
    barrier_sync(1 + w, 128);
    for (int j = 0; j < kTile / 16; ++j) {  // 16 columns
      uint32_t pairs[4];
      for (int i = 0; i < 4; ++i) {
        const auto low = __float2bfloat16_rn(d[8 * j + 2 * i]), high = __float2bfloat16_rn(d[8 * j + 2 * i + 1]);
        pairs[i] = uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
      }
      const int row = 16 * warp + lane % 16, bytes = 32 * (j % 4) + 16 * (lane / 16);
      stmatrix(&s.c[w][j / 4][swizzled(Swizzle::k128, 128 * row + bytes)], pairs);
    }
    if (p.mistake != kNoFence) fence_proxy_async();
    barrier_sync(1 + w, 128);
    if (threadIdx.x % 128 == 0) {
      for (int half = 0; half < 2; ++half) {
        tma_store(p.c, {tile % tiles_n * kTile + 64 * half, tile / tiles_n * kTile + 64 * w}, s.c[w][half]);
      }
      bulk_commit();
    }
  }
  if (threadIdx.x % 128 == 0) bulk_wait<0>();
}

__global__ void __launch_bounds__(kThreads, 1) pipeline(const __grid_constant__ Pipeline p) {
  Storage& s = *dynamic_shared<Storage>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kConsumers);
    }
    fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_lower<24>();
    if (threadIdx.x == 0) produce(p, s);
  } else {
    registers_raise<240>();
    consume(p, s, threadIdx.x / 128 - 1);
  }
}

extern "C" const char* lcore_emulator_pipeline(const char* mistake, const void* a, const void* b, void* c, int m, int n,
                                               int k, int blocks) {
  return emulator::guarded([=] {
    static const std::map<std::string, PipelineMistake> mistakes{{"none", kNone},
                                                                 {"no_empty_wait", kNoEmptyWait},
                                                                 {"releases_early", kReleasesEarly},
                                                                 {"one_stage_behind", kOneStageBehind},
                                                                 {"no_fence", kNoFence}};
    const auto map = [](const void* data, int64_t rows, int64_t columns) {
      return tensor_map(DType::kBFloat16, data, {columns, rows}, {columns}, {64, 64}, Swizzle::k128);
    };
    const Pipeline p{map(a, m, k), map(b, n, k), map(c, m, n), m, n, k, mistakes.at(mistake)};
    launch(pipeline, dim3(blocks), dim3(kThreads), sizeof(Storage), emulator::no_stream(), p);
  });
}
