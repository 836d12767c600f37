// Kernels with one mistake each, which the emulator must name; and their correct twins, which it must not.
#include <cstring>
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/shared.h"
#include "entry.h"

struct Params {
  float* data;  // 64 floats
  int n;
};

__global__ void global_past_end(Params p) { p.data[threadIdx.x + 1] = 1.0f; }

__global__ void global_before(Params p) { p.data[0] = p.data[static_cast<int>(threadIdx.x) - 1]; }

__global__ void shared_past_end(Params p) {
  auto* tile = lcore::cuda::dynamic_shared<float>();
  tile[threadIdx.x + p.n] = 1.0f;
}

__global__ void static_past_end(Params p) {
  __shared__ float tile[64];
  tile[threadIdx.x + p.n] = 1.0f;
  p.data[threadIdx.x] = tile[threadIdx.x + p.n];
}

__global__ void shared_unwritten(Params p) {
  __shared__ float tile[64];
  if (static_cast<int>(threadIdx.x) < p.n) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  p.data[threadIdx.x] = tile[threadIdx.x];
}

__global__ void no_barrier(Params p) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 1.0f;
  p.data[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void no_barrier_before_reuse(Params p) {
  __shared__ float tile[64];
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    p.data[threadIdx.x] = tile[63 - threadIdx.x];
  }
}

__global__ void two_barriers(Params p) {
  __shared__ float tile[64];
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    p.data[threadIdx.x] = tile[63 - threadIdx.x];
    __syncthreads();
  }
}

__global__ void barrier_for_some(Params p) {
  if (static_cast<int>(threadIdx.x) < p.n) __syncthreads();
}

__global__ void vote_for_some(Params p) {
  if (static_cast<int>(threadIdx.x) < p.n) p.data[threadIdx.x] = static_cast<float>(__ballot_sync(0xffffffff, 1));
}

__global__ void misaligned(Params p) {
  const float4 x = *reinterpret_cast<const float4*>(p.data + 1);
  p.data[threadIdx.x] = x.x + x.y + x.z + x.w;
}

// Thread 0 waits for a number that thread n writes.
__global__ void spin_for_ever(Params p) {
  if (threadIdx.x == 0) {
    while (atomicAdd(&p.data[0], 0.0f) == 0.0f) {
    }
  }
  if (static_cast<int>(threadIdx.x) == p.n) atomicAdd(&p.data[0], 1.0f);
}

__global__ void nothing(Params) {}

namespace {

struct Case {
  void (*kernel)(Params);
  int n;
  size_t shared_bytes;
};

const std::map<std::string, Case>& cases() {
  static const std::map<std::string, Case> all{
      {"global_past_end", {global_past_end, 0, 0}},
      {"global_before", {global_before, 0, 0}},
      {"shared_past_end", {shared_past_end, 1, 256}},
      {"shared_within", {shared_past_end, 0, 256}},
      {"static_past_end", {static_past_end, 1, 0}},
      {"static_within", {static_past_end, 0, 0}},
      {"shared_unwritten", {shared_unwritten, 40, 0}},
      {"shared_written", {shared_unwritten, 64, 0}},
      {"no_barrier", {no_barrier, 0, 0}},
      {"no_barrier_before_reuse", {no_barrier_before_reuse, 0, 0}},
      {"two_barriers", {two_barriers, 0, 0}},
      {"barrier_for_some", {barrier_for_some, 33, 0}},
      {"barrier_for_all", {barrier_for_some, 64, 0}},
      {"vote_for_some", {vote_for_some, 5, 0}},
      {"misaligned", {misaligned, 0, 0}},
      {"spin_for_ever", {spin_for_ever, 64, 0}},
      {"spin_a_while", {spin_for_ever, 63, 0}},
      {"too_much_shared", {nothing, 0, 232449}},
      {"all_shared", {nothing, 0, 232448}},
  };
  return all;
}

}  // namespace

extern "C" const char* lcore_emulator_broken(const char* name, float* data) {
  return lcore::emulator::guarded([=] {
    const Case& c = cases().at(name);
    lcore::cuda::launch(c.kernel, dim3(3), dim3(64), c.shared_bytes, lcore::emulator::no_stream(), Params{data, c.n});
  });
}
