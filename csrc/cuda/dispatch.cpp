// Picks the architecture family of the current device: the only place that asks for it.
#include <string>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda {
namespace {

// 10 * major + minor of the current device.
int architecture() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

}  // namespace

void merge_states(const MergeParams& params, cudaStream_t stream) {
  const int arch = architecture();
  if (arch == 90) return sm90::merge_states(params, stream);
  if (arch >= 80) return generic::merge_states(params, stream);
  throw std::runtime_error("lcore.merge_states: the GPU must be sm_80 or later, got sm_" + std::to_string(arch));
}

}  // namespace lcore::cuda
