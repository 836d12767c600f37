// Merging two attention states over disjoint keys:
//   lse = ln(e^lse_a + e^lse_b),  out = w_a out_a + w_b out_b  with  w_x = e^(lse_x - lse).
// One warp a row (batch, seq, head): it reads both outputs once and writes one, so the kernel is bound by memory. The
// state (0, -inf) is neutral on both sides, also against itself. Included by one .cu file an architecture family.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/merge_states.h"
#include "cuda/launch.h"

namespace lcore::cuda {

constexpr int kWarpLanes = 32;
constexpr int kWarpsABlock = 8;  // 256 threads: eight blocks fill an SM's 2048

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class X>
__device__ T narrow(X x) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, __half>)
      return __float2half_rn(x);
    else
      return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <class T, class Lse>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) merge_states_kernel(MergeParams p) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t rows = p.batch * p.seq * p.heads;
  const int64_t stride = int64_t{gridDim.x} * kWarpsABlock;
  for (int64_t row = int64_t{blockIdx.x} * kWarpsABlock + threadIdx.x / kWarpLanes; row < rows; row += stride) {
    const int64_t head = row % p.heads, seq = row / p.heads % p.seq, batch = row / p.heads / p.seq;
    const int64_t at = (batch * p.heads + head) * p.seq + seq;
    const Lse lse_a = static_cast<const Lse*>(p.lse_a)[at];
    const Lse lse_b = static_cast<const Lse*>(p.lse_b)[at];
    const Lse top = isnan(lse_a) || lse_a > lse_b ? lse_a : lse_b;  // NaN wins
    const bool none = top == -INFINITY;
    // An infinite lse takes everything; two of them share it.
    const Lse a = none ? Lse{0} : (lse_a == top ? Lse{1} : exp(lse_a - top));
    const Lse b = none ? Lse{0} : (lse_b == top ? Lse{1} : exp(lse_b - top));
    const Lse scale = none ? Lse{0} : Lse{1} / (a + b);
    const T* out_a = static_cast<const T*>(p.out_a) + row * p.head_dim;
    const T* out_b = static_cast<const T*>(p.out_b) + row * p.head_dim;
    T* out = static_cast<T*>(p.out) + row * p.head_dim;
    for (int64_t c = lane; c < p.head_dim; c += kWarpLanes) {
      out[c] = narrow<T>(widen(out_a[c]) * (a * scale) + widen(out_b[c]) * (b * scale));
    }
    if (lane == 0) static_cast<Lse*>(p.lse)[at] = none ? top : top + log(a + b);
  }
}

inline void launch_merge_states(const MergeParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.seq * p.heads;
  if (rows == 0) return;
  // Warps stride over the rows, so a grid of 65535 blocks serves any number of them.
  const int64_t blocks = (rows + kWarpsABlock - 1) / kWarpsABlock;
  const dim3 grid(static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
  const dim3 block(kWarpLanes * kWarpsABlock);
  switch (p.type) {
    case DType::kFloat32:
      return launch(merge_states_kernel<float, float>, grid, block, 0, stream, p);
    case DType::kFloat64:
      return launch(merge_states_kernel<double, double>, grid, block, 0, stream, p);
    case DType::kFloat16:
      return launch(merge_states_kernel<__half, float>, grid, block, 0, stream, p);
    case DType::kBFloat16:
      return launch(merge_states_kernel<__nv_bfloat16, float>, grid, block, 0, stream, p);
    default:
      throw std::runtime_error("lcore.merge_states: no CUDA kernel for element type code " +
                               std::to_string(static_cast<int>(p.type)));
  }
}

}  // namespace lcore::cuda
