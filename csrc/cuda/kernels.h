// The CUDA kernels as the host sees them: one function an op, which picks the architecture family.
#pragma once

#include <cuda_runtime.h>

#include "core/merge_states.h"

namespace lcore::cuda {

// Compiled for sm_80 and, through PTX, every later chip.
namespace generic {
void merge_states(const MergeParams& params, cudaStream_t stream);
}
// Compiled for sm_90a: Hopper only.
namespace sm90 {
void merge_states(const MergeParams& params, cudaStream_t stream);
}

// Throws std::runtime_error on a chip older than sm_80, naming it.
void merge_states(const MergeParams& params, cudaStream_t stream);

}  // namespace lcore::cuda
