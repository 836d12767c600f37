// The families of generic attention kernels. Tensor cores take 16-bit inputs of head_dim up to 256; everything else,
// float32 and float64 above all, goes through fused multiply-adds.
#pragma once

#include <algorithm>

#include "core/attention.h"
#include "cuda/stream.h"

namespace lcore::cuda::generic {

inline bool on_tensor_cores(const AttentionParams& p) {
  return (p.type == DType::kFloat16 || p.type == DType::kBFloat16) && std::max(p.head_dim, p.head_dim_v) <= 256;
}

void attention_forward_mma(const AttentionParams& params, Stream& stream);
void attention_forward_fma(const AttentionParams& params, Stream& stream);

// `delta`, shaped as lse and of its type, is dO . O - dlse.
void attention_backward_mma(const AttentionGradParams& params, const float* delta, Stream& stream);
void attention_backward_fma(const AttentionGradParams& params, const void* delta, Stream& stream);

}  // namespace lcore::cuda::generic
