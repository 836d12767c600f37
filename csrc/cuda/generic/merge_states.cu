// merge_states for sm_80 and later.
#include "cuda/kernels.h"
#include "cuda/merge_states.cuh"

namespace lcore::cuda::generic {

void merge_states(const MergeParams& params, cudaStream_t stream) { launch_merge_states(params, stream); }

}  // namespace lcore::cuda::generic
