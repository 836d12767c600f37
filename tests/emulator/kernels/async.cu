// Producers and consumers with mbarriers, named barriers and cp.async: correct, and with one mistake each.
#include <map>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/mbarrier.h"
#include "entry.h"

using namespace lcore::cuda;

struct Async {
  float* data;  // 128 floats: four chunks of 32, doubled in place
  int n;
};

// Warp 0 fills a ring of two stages, warp 1 empties it. n: arrivals that "full" waits for; 32 is right.
__global__ void ring(Async p) {
  __shared__ uint64_t full[2], empty[2];
  __shared__ float stages[2][32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&full[s], p.n);
      mbarrier_init(&empty[s], 32);
    }
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const int s = i % 2, round = i / 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(&empty[s], (round + 1) % 2);  // of a new barrier, the phase of parity 1 counts as ended
      stages[s][lane] = p.data[32 * i + lane];
      mbarrier_arrive(&full[s]);
    } else {
      mbarrier_wait(&full[s], round % 2);
      p.data[32 * i + lane] = 2 * stages[s][31 - lane];
      mbarrier_arrive(&empty[s]);
    }
  }
}

// As ring, but the producer does not wait until its stage is empty.
__global__ void ring_overrun(Async p) {
  __shared__ uint64_t full;
  __shared__ float stage[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(&full, 32);
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x < 32) {
      stage[lane] = p.data[32 * i + lane];
      mbarrier_arrive(&full);
    } else {
      mbarrier_wait(&full, i % 2);
      p.data[32 * i + lane] = 2 * stage[lane];
    }
  }
}

__global__ void mbarrier_unmade(Async) {
  __shared__ uint64_t barrier;
  mbarrier_arrive(&barrier);
}

__global__ void mbarrier_unannounced(Async) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 64);
  if (threadIdx.x / 32 == 1) mbarrier_arrive(&barrier);
}

// Warp 0 hands a row to warp 1 through barrier 1; n threads are waited for, 64 is right.
__global__ void named(Async p) {
  __shared__ float row[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    row[lane] = p.data[lane];
    barrier_arrive(1, p.n);
  } else {
    barrier_sync(1, p.n);
    p.data[lane] = 2 * row[31 - lane];
  }
}

__global__ void named_differently(Async p) {
  if (threadIdx.x < 32) {
    barrier_arrive(2, 64);
  } else {
    barrier_sync(2, p.n);
  }
}

// A copy of 64 floats. n: groups that may be on their way when they are read; 0 is right.
__global__ void copied(Async p) {
  __shared__ __align__(16) float row[64];
  cp_async<4>(&row[threadIdx.x], &p.data[threadIdx.x]);
  cp_async_commit();
  if (p.n == 0) cp_async_wait<0>();
  if (p.n == 1) cp_async_wait<1>();
  __syncthreads();
  p.data[threadIdx.x] = 2 * row[63 - threadIdx.x];
}

__global__ void copied_misaligned(Async p) {
  __shared__ __align__(16) float row[80];
  cp_async<16>(&row[threadIdx.x], &p.data[0]);
}

// Fills with zeros what lies past the end, and reads nothing there.
__global__ void copied_zeros(Async p) {
  __shared__ __align__(16) float row[256];
  const bool there = threadIdx.x < 32;
  cp_async<16>(&row[4 * threadIdx.x], &p.data[4 * threadIdx.x], there ? p.n : 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < 32) p.data[threadIdx.x] = row[4 * threadIdx.x + 3] + row[128 + threadIdx.x];
}

namespace {

struct Case {
  void (*kernel)(Async);
  int n;
};

const std::map<std::string, Case>& cases() {
  static const std::map<std::string, Case> all{
      {"ring", {ring, 32}},
      {"ring_starved", {ring, 33}},
      {"ring_overrun", {ring_overrun, 0}},
      {"mbarrier_unmade", {mbarrier_unmade, 0}},
      {"mbarrier_unannounced", {mbarrier_unannounced, 0}},
      {"named", {named, 64}},
      {"named_starved", {named, 96}},
      {"named_odd", {named, 63}},
      {"named_differently", {named_differently, 96}},
      {"copied", {copied, 0}},
      {"copied_early", {copied, 1}},
      {"copied_misaligned", {copied_misaligned, 0}},
      {"copied_zeros", {copied_zeros, 12}},
      {"copied_past_end", {copied_zeros, 20}},
  };
  return all;
}

}  // namespace

extern "C" const char* lcore_emulator_async(const char* name, float* data) {
  return lcore::emulator::guarded([=] {
    const Case& c = cases().at(name);
    launch(c.kernel, dim3(1), dim3(64), 0, lcore::emulator::no_stream(), Async{data, c.n});
  });
}
