// lcore::hadamard on CPU tensors.
#include "core/hadamard.h"

#include "cpu/kernels.h"
#include "torch/library.h"

namespace lcore {
namespace {

Tensor hadamard(Tensor x, bool inverse) {
  const int64_t rank = x.dim();
  require(x.is_cpu() && (rank == 3 || rank == 4), "hadamard",
          "x must be on the CPU with 3 or 4 dimensions, got " + shape_text(x));
  HadamardParams p{};
  p.type = dtype_of(x);
  p.x = strided(x);
  p.batch = rank == 4 ? x.size(0) : 1;
  p.seq = x.size(rank - 3);
  p.heads = x.size(rank - 2);
  p.dim = static_cast<int>(x.size(rank - 1));
  p.inverse = inverse;
  Tensor out = new_tensor(x, {x.sizes().begin(), x.sizes().end()});
  p.out = out.data_ptr();
  TorchExecutor executor;
  cpu::kernels().hadamard(p, executor);
  return out;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) { m.def("hadamard(Tensor x, bool inverse=False) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) { m.impl("hadamard", LCORE_BOX(lcore::hadamard)); }
