// lcore::_peak: the machine's ceilings, measured on torch's threads with the kernels' instruction set.
#include "cpu/kernels.h"
#include "torch/library.h"

namespace lcore {
namespace {

double peak(std::string what, int64_t repeats) {
  TorchExecutor executor;
  const int times = static_cast<int>(repeats);
  if (what == "fma") return cpu::kernels().peak_fma(executor, times);
  if (what == "dot") return cpu::kernels().peak_dot(executor, times);
  if (what == "read") return cpu::kernels().peak_read(executor, times);
  STD_TORCH_CHECK(false, "lcore._peak: what must be fma, dot or read, got ", what);
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) { m.def("_peak(str what, int repeats=5) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(lcore, CompositeExplicitAutograd, m) { m.impl("_peak", LCORE_BOX(lcore::peak)); }
