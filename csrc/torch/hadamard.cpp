// lcore::hadamard.
#include "core/hadamard.h"

#include "torch/device.h"

namespace lcore {
namespace {

Tensor hadamard(Tensor x, bool inverse) {
  const int64_t rank = x.dim();
  require(rank == 3 || rank == 4, "hadamard", "x must have 3 or 4 dimensions, got " + shape_text(x));
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
  LCORE_RUN(hadamard, x, p)
  return out;
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) { m.def("hadamard(Tensor x, bool inverse=False) -> Tensor"); }

LCORE_KERNELS(m) { m.impl<lcore::hadamard>("hadamard"); }
