// What later chips add: products of fp8, stmatrix, and bytes that an mbarrier counts.
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/stmatrix.h"
#include "entry.h"
#include "gemm.h"

using namespace lcore::cuda;

struct Matrices {
  const uint32_t* fragments;  // (32, 4): a lane's registers
  uint16_t* out;              // (4, 8, 8)
  bool transposed;
};

__global__ void store_fragments(Matrices p) {
  __shared__ __align__(16) uint16_t tile[4][8][8];
  const int lane = threadIdx.x;
  uint32_t registers[4];
  for (int m = 0; m < 4; ++m) registers[m] = p.fragments[4 * lane + m];
  if (p.transposed) {
    stmatrix_trans(&tile[lane / 8][lane % 8][0], registers);
  } else {
    stmatrix(&tile[lane / 8][lane % 8][0], registers);
  }
  __syncthreads();
  for (int i = lane; i < 256; i += 32) p.out[i] = tile[i / 64][i / 8 % 8][i % 8];
}

struct Bytes {
  float* out;
  int announced, brought;
};

// Warp 0 announces bytes and brings them; warp 1 waits for them.
__global__ void count_bytes(Bytes p) {
  __shared__ uint64_t barrier;
  __shared__ float value;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, p.announced);
    value = 7.0f;
    mbarrier_complete(&barrier, p.brought);
  }
  if (threadIdx.x == 32) {
    mbarrier_wait(&barrier, 0);
    *p.out = value;
  }
}

extern "C" {

const char* lcore_emulator_gemm_fp8(const Gemm* p) {
  return lcore::emulator::guarded([=] { launch_gemm(gemm_words<float, mma_m16n8k32_e4m3, 4>, *p); });
}

const char* lcore_emulator_store_fragments(const Matrices* p) {
  return lcore::emulator::guarded(
      [=] { launch(store_fragments, dim3(1), dim3(32), 0, lcore::emulator::no_stream(), *p); });
}

const char* lcore_emulator_count_bytes(float* out, int announced, int brought) {
  return lcore::emulator::guarded(
      [=] { launch(count_bytes, dim3(1), dim3(64), 0, lcore::emulator::no_stream(), Bytes{out, announced, brought}); });
}

}  // extern "C"
