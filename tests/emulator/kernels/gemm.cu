// Products through mma.sync, ldmatrix and cp.async, as sm_80 has them.
#include "gemm.h"

#include <stdexcept>
#include <string>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "entry.h"

using namespace lcore::cuda;

// Two stages of a 16 x 16 tile of a and a 16 x 8 tile of b: the next one is on its way while this one is multiplied.
template <void (*kMma)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void gemm_staged(Gemm p) {
  __shared__ __align__(16) uint16_t a_tile[2][16][16], b_tile[2][16][8];
  const int lane = threadIdx.x;
  const auto fetch = [&](int k) {
    const int stage = k / 16 % 2;
    const auto* a = static_cast<const uint16_t*>(p.a) + (16 * blockIdx.y + lane / 2) * p.k + k + 8 * (lane % 2);
    const auto* b = static_cast<const uint16_t*>(p.b) + (k + lane % 16) * p.n + 8 * blockIdx.x;
    cp_async<16>(&a_tile[stage][lane / 2][8 * (lane % 2)], a);
    if (lane < 16) cp_async<16>(&b_tile[stage][lane][0], b);
  };
  float d[4] = {};
  fetch(0);
  cp_async_commit();
  for (int k = 0; k < p.k; k += 16) {
    if (k + 16 < p.k) fetch(k + 16);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const int stage = k / 16 % 2;
    uint32_t a[4], b[2];
    ldmatrix(a, &a_tile[stage][lane % 16][8 * (lane / 16)]);
    ldmatrix_trans(b, &b_tile[stage][lane % 16][0]);
    kMma(d, a, b);
    __syncthreads();
  }
  store_tile(p, d);
}

namespace {

void gemm(const std::string& type, const Gemm& p) {
  if (type == "bf16") return launch_gemm(gemm_staged<mma_m16n8k16_bf16>, p);
  if (type == "fp16") return launch_gemm(gemm_staged<mma_m16n8k16_fp16>, p);
  if (type == "tf32") return launch_gemm(gemm_words<float, mma_m16n8k8_tf32, 1>, p);
  if (type == "s8") return launch_gemm(gemm_words<int32_t, mma_m16n8k32_s8, 4>, p);
  throw std::runtime_error("no product of type " + type);
}

}  // namespace

extern "C" const char* lcore_emulator_gemm(const char* type, const Gemm* p) {
  return lcore::emulator::guarded([=] { gemm(type, *p); });
}
