// Argument checks and results that the CPU and the CUDA op share.
#pragma once

#include "core/merge_states.h"
#include "torch/library.h"

namespace lcore {

// The tensors of a merge as a kernel sees them, contiguous; holds them for as long as the kernel runs.
struct MergeTensors {
  Tensor out_a, lse_a, out_b, lse_b, out, lse;
  MergeParams params;
};

MergeTensors merge_tensors(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b);

}  // namespace lcore
