// lcore::merge_states on CUDA tensors.
#include "cuda/kernels.h"
#include "torch/cuda_stream.h"
#include "torch/merge_states.h"

namespace lcore {
namespace {

std::tuple<Tensor, Tensor> merge_states_cuda(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  for (const Tensor& t : {lse_a, out_b, lse_b}) {
    require(t.is_cuda() && t.get_device_index() == out_a.get_device_index(), "merge_states",
            "every tensor must be on out_a's device");
  }
  const torch::stable::accelerator::DeviceGuard guard(out_a.get_device_index());
  MergeTensors t = merge_tensors(out_a, lse_a, out_b, lse_b);
  cuda::merge_states(t.params, current_stream(out_a.get_device_index()));
  return {t.out, t.lse};
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_IMPL(lcore, CUDA, m) { m.impl("merge_states", LCORE_BOX(lcore::merge_states_cuda)); }
