// merge_states for Hopper.
#include "cuda/kernels.h"
#include "cuda/merge_states.cuh"

namespace lcore::cuda::sm90 {

void merge_states(const MergeParams& params, cudaStream_t stream) { launch_merge_states(params, stream); }

}  // namespace lcore::cuda::sm90
