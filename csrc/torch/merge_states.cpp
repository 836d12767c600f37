// lcore::merge_states and its backward.
#include "core/merge_states.h"

#include <algorithm>

#include "torch/device.h"

namespace lcore {
namespace {

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

Tensor like(const Tensor& x) { return new_tensor(x, {x.sizes().begin(), x.sizes().end()}); }

// The tensors of a merge as a kernel sees them, contiguous; holds them for as long as the kernel runs.
struct MergeTensors {
  Tensor out_a, lse_a, out_b, lse_b, out, lse;
  MergeParams params;
};

MergeTensors merge_tensors(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  using torch::headeronly::ScalarType;
  const char* op = "merge_states";
  const int64_t rank = out_a.dim();
  require(rank == 3 || rank == 4, op, "out_a must have 3 or 4 dimensions, got " + shape_text(out_a));
  require(same_shape(out_a, out_b) && out_a.scalar_type() == out_b.scalar_type(), op,
          "out_b must have out_a's shape and dtype, got " + shape_text(out_b));
  const auto wanted = out_a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  MergeTensors t{dense(out_a), dense(lse_a), dense(out_b), dense(lse_b), like(out_a), like(lse_a), MergeParams{}};
  MergeParams& p = t.params;
  p.type = dtype_of(out_a);
  p.batch = rank == 4 ? out_a.size(0) : 1;
  p.seq = out_a.size(rank - 3);
  p.heads = out_a.size(rank - 2);
  p.head_dim = out_a.size(rank - 1);
  for (const Tensor& lse : {lse_a, lse_b}) {
    require(lse.scalar_type() == wanted && lse.dim() == rank - 1 && (rank == 3 || lse.size(0) == p.batch) &&
                lse.size(rank - 3) == p.heads && lse.size(rank - 2) == p.seq,
            op, "lse must have shape (batch, heads, seq) or (heads, tokens), got " + shape_text(lse));
  }
  p.out_a = t.out_a.data_ptr();
  p.lse_a = t.lse_a.data_ptr();
  p.out_b = t.out_b.data_ptr();
  p.lse_b = t.lse_b.data_ptr();
  p.out = t.out.data_ptr();
  p.lse = t.lse.data_ptr();
  return t;
}

std::tuple<Tensor, Tensor> merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  MergeTensors t = merge_tensors(out_a, lse_a, out_b, lse_b);
  LCORE_RUN(merge_states, out_a, t.params)
  return {t.out, t.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a,
                                                                 Tensor out_b, Tensor lse_b) {
  MergeTensors t = merge_tensors(out_a, lse_a, out_b, lse_b);
  require(same_shape(dout, t.out) && dout.scalar_type() == t.out.scalar_type() && same_shape(dlse, t.lse) &&
              dlse.scalar_type() == t.lse.scalar_type(),
          "merge_states_backward", "dout and dlse must have the shapes and dtypes of out and lse");
  const Tensor dense_dout = dense(dout), dense_dlse = dense(dlse);
  Tensor dout_b = like(out_b), dlse_b = like(lse_b);
  // The forward's results are not needed: their buffers take the gradients of a.
  const MergeGradParams g{t.params,         dense_dout.data_ptr(), dense_dlse.data_ptr(), t.out.data_ptr(),
                          t.lse.data_ptr(), dout_b.data_ptr(),     dlse_b.data_ptr()};
  LCORE_RUN(merge_states_backward, out_a, g)
  return {t.out, t.lse, dout_b, dlse_b};
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_states_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
      " -> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)");
}

LCORE_KERNELS(m) {
  m.impl<lcore::merge_states>("merge_states");
  m.impl<lcore::merge_states_backward>("merge_states_backward");
}
