// Picks the architecture family of the current device: the only place that asks for it.
#include <string>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda {
namespace {

// 10 * major + minor of the current device, which must be sm_80 or later.
int architecture(const char* op) {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const int arch = 10 * major + minor;
  if (arch >= 80) return arch;
  throw std::runtime_error(std::string("lcore.") + op + ": the GPU must be sm_80 or later, got sm_" +
                           std::to_string(arch));
}

}  // namespace

void attention_forward(const AttentionParams& params, Stream& stream) {
  architecture("attention");
  if (params.pages != nullptr) return generic::attention_paged(params, stream);
  generic::attention_forward(params, stream);
}

void attention_backward(const AttentionGradParams& params, Stream& stream) {
  architecture("attention");
  generic::attention_backward(params, stream);
}

void causal_conv1d(const CausalConv1dParams& params, Stream& stream) {
  architecture("causal_conv1d");
  generic::causal_conv1d(params, stream);
}

void causal_conv1d_backward(const CausalConv1dGradParams& params, Stream& stream) {
  architecture("causal_conv1d");
  generic::causal_conv1d_backward(params, stream);
}

void merge_states(const MergeParams& params, Stream& stream) {
  architecture("merge_states");
  generic::merge_states(params, stream);
}

void merge_states_backward(const MergeGradParams& params, Stream& stream) {
  architecture("merge_states");
  generic::merge_states_backward(params, stream);
}

void hadamard(const HadamardParams& params, Stream& stream) {
  architecture("hadamard");
  generic::hadamard(params, stream);
}

void rope(const RopeParams& params, Stream& stream) {
  architecture("rope");
  generic::rope(params, stream);
}

void cache_append(const CacheAppendParams& params, Stream& stream) {
  architecture("cache_append_");
  generic::cache_append(params, stream);
}

void cache_compact(const CacheCompactParams& params, Stream& stream) {
  architecture("cache_compact_");
  generic::cache_compact(params, stream);
}

void page_bounds(const PageBoundsParams& params, Stream& stream) {
  architecture("page_bounds");
  generic::page_bounds(params, stream);
}

void page_scores(const PageScoresParams& params, Stream& stream) {
  architecture("page_scores");
  generic::page_scores(params, stream);
}

void select_pages(const SelectPagesParams& params, Stream& stream) {
  architecture("select_pages");
  generic::select_pages(params, stream);
}

void selective_scan(const SelectiveScanParams& params, Stream& stream) {
  architecture("selective_scan");
  generic::selective_scan(params, stream);
}

void selective_scan_backward(const SelectiveScanGradParams& params, Stream& stream) {
  architecture("selective_scan");
  generic::selective_scan_backward(params, stream);
}

}  // namespace lcore::cuda
