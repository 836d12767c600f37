// The algebra of partial states of attention over a paged cache, and how a row ends.
#pragma once

#include "cuda/generic/attention_paged/rows.cuh"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {

constexpr float kLn2 = 0.6931471805599453f;

// A row whose every score is -inf keeps its neutral state: subtracting 0 makes each weight exp2(-inf) = 0.
__device__ inline float reference(float max) { return max == -INFINITY ? 0.0f : max; }

// The states of a row's units, folded in order; max in powers of 2. (-inf, 0, 0) is neutral.
struct Fold {
  float max = -INFINITY;
  float sum = 0;
  float keep = 0;  // what the out so far is worth after the last add, and what the added one is
  float gain = 0;

  __device__ void add(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max);
    keep = exp2f(max - reference(both));
    gain = exp2f(other_max - reference(both));
    sum = fmaf(other_sum, gain, sum * keep);
    max = both;
  }
  __device__ float out(float so_far, float added) const { return fmaf(added, gain, so_far * keep); }
};

// What a row's out is multiplied by at its end, sinks included; its lse.
__device__ inline float finish(const AttentionParams& a, int64_t head, const Fold& fold, float& lse) {
  float max = fold.max, sum = fold.sum, scale = 1;
  const float sink = a.sinks == nullptr ? -INFINITY : static_cast<const float*>(a.sinks)[head] * kLog2E;
  if (sink > -INFINITY) {
    const float both = fmaxf(max, sink);
    scale = max == both ? 1.0f : exp2f(max - both);
    sum = sum * scale + (sink == both ? 1.0f : exp2f(sink - both));
    max = both;
  }
  lse = sum == 0 ? -INFINITY : max * kLn2 + logf(sum);
  return sum > 0 ? scale / sum : (sum == 0 ? 0.0f : sum);
}

__device__ inline int64_t out_row(const AttentionParams& a, const Slot& s, int64_t row) {
  return ((s.batch * a.seq_q + row / s.group) * a.heads + s.head(row)) * a.head_dim_v;
}
__device__ inline void store_out(const AttentionParams& a, int64_t at, float x) {
  x += 0.0f;  // makes -0 into 0: a sum that underflowed has the sign of its last term
  if (a.type == DType::kFloat32)
    static_cast<float*>(a.out)[at] = x;
  else if (a.type == DType::kFloat16)
    static_cast<__half*>(a.out)[at] = __float2half_rn(x);
  else
    static_cast<__nv_bfloat16*>(a.out)[at] = __float2bfloat16_rn(x);
}
__device__ inline void store_lse(const AttentionParams& a, const Slot& s, int64_t row, float lse) {
  static_cast<float*>(a.lse)[s.batch * a.lse_batch + s.head(row) * a.lse_head + row / s.group] = lse;
}

}  // namespace lcore::cuda::generic
