// lcore::_peak: the machine's ceilings, measured on torch's threads with the kernels' instruction set.
#include "cpu/kernels.h"
#include "torch/library.h"

namespace lcore {
namespace {

double peak(std::string what) {
  TorchExecutor executor;
  if (what == "fma") return cpu::kernels().peak_fma(executor);
  if (what == "dot") return cpu::kernels().peak_dot(executor);
  if (what == "read") return cpu::kernels().peak_read(executor);
  STD_TORCH_CHECK(false, "lcore._peak: what must be fma, dot or read, got ", what);
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) { m.def("_peak(str what) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(lcore, CompositeExplicitAutograd, m) { m.impl("_peak", LCORE_BOX(lcore::peak)); }
