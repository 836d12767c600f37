// What this build and this machine are, for lcore.build_info().
#include "cpu/kernels.h"
#include "torch/library.h"

namespace lcore {
namespace {

// key=value lines.
std::string build_facts() {
  std::string facts = std::string("version=") + LCORE_VERSION + "\ncpu_isa=" + cpu::kernels().isa +
                      "\ncpu_isas_built=" + cpu::built_isas() + "\ncuda_archs=";
#ifdef LCORE_WITH_CUDA
  facts += LCORE_CUDA_ARCHS;
#endif
  return facts;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY(lcore, m) { m.def("_build_facts() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(lcore, CompositeExplicitAutograd, m) {
  m.impl("_build_facts", LCORE_BOX(lcore::build_facts));
}
