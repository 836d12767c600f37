// Every collective of a warp and of a block once, each result in a column of its own.
#include "cuda/launch.h"
#include "entry.h"

struct Results {
  int* out;   // (64, 16): a row a thread
  int* sums;  // (4)
};

__global__ void collectives(Results p) {
  constexpr unsigned kAll = 0xffffffff;
  const int t = threadIdx.x, lane = t % 32;
  int* out = p.out + 16 * t;
  out[0] = __shfl_sync(kAll, t, 5);
  out[1] = __shfl_sync(kAll, t, 9, 8);
  out[2] = __shfl_up_sync(kAll, t, 3);
  out[3] = __shfl_down_sync(kAll, t, 3, 16);
  out[4] = __shfl_xor_sync(kAll, t, 6);
  out[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[6] = __any_sync(kAll, t == 40) + 2 * __all_sync(kAll, t < 32);
  out[7] = static_cast<int>(__match_any_sync(kAll, lane % 4));
  out[8] = __reduce_add_sync(kAll, t);
  out[9] = __reduce_min_sync(kAll, t - 40) + 1000 * __reduce_max_sync(kAll, t);
  out[10] = static_cast<int>(__reduce_xor_sync(kAll, 1u << lane % 5));
  if (lane < 8) {  // the half of a warp that is there
    out[11] = __shfl_xor_sync(0xffu, t, 1);
    __syncwarp(0xffu);
  }
  out[12] = __syncthreads_count(t % 5 == 0);
  out[13] = __syncthreads_or(t == 63) + 2 * __syncthreads_and(t < 63);
  out[14] = static_cast<int>(__shfl_xor_sync(kAll, 0.5 * t, 1) * 2);
  atomicAdd(&p.sums[0], t);
  atomicMax(&p.sums[1], t + static_cast<int>(blockIdx.x));
  atomicCAS(&p.sums[2], 0, 7);
  __shared__ unsigned tickets;
  if (t == 0) tickets = 0;
  __syncthreads();
  out[15] = static_cast<int>(atomicInc(&tickets, 63));
  __syncthreads();
  if (t == 0) atomicExch(&p.sums[3], static_cast<int>(tickets) + 1);
}

extern "C" const char* lcore_emulator_collectives(int* out, int* sums, int blocks) {
  return lcore::emulator::guarded([=] {
    lcore::cuda::launch(collectives, dim3(blocks), dim3(64), 0, lcore::emulator::no_stream(), Results{out, sums});
  });
}
