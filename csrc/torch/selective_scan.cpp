// lcore::selective_scan, its backward and lcore::selective_state_update.
#include "core/selective_scan.h"

#include "torch/device.h"
#include "torch/recurrent.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMaxStates = 256;

SelectiveScanParams scan_params(const char* op, const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                const OptionalTensor& delta_bias, bool delta_softplus,
                                const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  require(u.dim() == 3, op, "u must have 3 dimensions, got " + shape_text(u));
  require(a.dim() == 2 && b.dim() == 4, op, "A must have 2 dimensions and B 4, got " + shape_text(b));
  SelectiveScanParams p{};
  const int64_t batch = u.size(0), dim = u.size(1), steps = u.size(2), states = a.size(1), groups = b.size(1);
  require_float(op, "u", u, u);
  require_float(op, "delta", delta, u);
  require_float(op, "B", b, u);
  require_float(op, "C", c, u);
  require_shape(op, "delta", delta, {batch, dim, steps});
  require(states >= 1 && states <= kMaxStates, op, "A must have 1 to 256 states, got " + std::to_string(states));
  require(groups >= 1 && dim % groups == 0, op, "B must have groups that divide dim " + std::to_string(dim));
  require_shape(op, "B", b, {batch, groups, states, steps});
  require_shape(op, "C", c, {batch, groups, states, steps});
  if (z.has_value()) {
    require_float(op, "z", *z, u);
    require_shape(op, "z", *z, {batch, dim, steps});
  }
  p.sequences = sequences(op, cu_seqlens, batch, steps);
  const ScalarType wide = wide_type(u);
  require_dense(op, "A", a, wide, {dim, states});
  require_dense(op, "D", d, wide, {dim});
  require_dense(op, "delta_bias", delta_bias, wide, {dim});
  require_dense(op, "initial_state", initial_state, wide, {p.sequences.count, dim, states});
  p.is_double = wide == ScalarType::Double;
  p.dim = dim;
  p.groups = groups;
  p.states = static_cast<int>(states);
  p.delta_softplus = delta_softplus;
  p.u = series(u);
  p.delta = series(delta);
  p.z = series(z);
  p.b = series(b);
  p.c = series(c);
  p.b_group = b.stride(1);
  p.c_group = c.stride(1);
  p.a = a.data_ptr();
  p.d = data_or_null(d);
  p.delta_bias = data_or_null(delta_bias);
  p.initial = {data_or_null(initial_state), p.is_double ? DType::kFloat64 : DType::kFloat32, nullptr};
  return p;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c,
                                                  OptionalTensor d, OptionalTensor z, OptionalTensor delta_bias,
                                                  bool delta_softplus, OptionalTensor initial_state,
                                                  OptionalTensor cu_seqlens, bool keep) {
  SelectiveScanParams p =
      scan_params("selective_scan", u, delta, a, b, c, d, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  Tensor out = empty_as(u);
  Tensor final_state = new_tensor(a, {p.sequences.count, p.dim, p.states});
  Tensor checkpoints = new_tensor(a, {keep ? chunk_slots(p.sequences) : 0, p.states, p.dim});
  zero_unused(p.sequences, out);
  p.out = series(out);
  p.final = {final_state.data_ptr(), p.initial.type, nullptr};
  p.checkpoints = keep ? checkpoints.data_ptr() : nullptr;
  LCORE_RUN(selective_scan, u, p)
  return {out, final_state, checkpoints};
}

// One step of every row, in place: a scan of length 1 has the bits of a longer one.
Tensor selective_state_update(Tensor state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, OptionalTensor d,
                              OptionalTensor z, OptionalTensor dt_bias, bool dt_softplus,
                              OptionalTensor state_indices) {
  const char* op = "selective_state_update";
  require(x.dim() == 2 && b.dim() == 3, op, "x must have 2 dimensions and B 3, got " + shape_text(x));
  const auto step = [](const Tensor& t) { return torch::stable::unsqueeze(t, -1); };
  const OptionalTensor gate = z.has_value() ? OptionalTensor(step(*z)) : OptionalTensor();
  SelectiveScanParams p =
      scan_params(op, step(x), step(dt), a, step(b), step(c), d, gate, dt_bias, dt_softplus, {}, {});
  require_float(op, "state", state, x);
  require(state.is_contiguous() && state.dim() == 3 && (state_indices.has_value() || state.size(0) == x.size(0)), op,
          "state must be contiguous with a row for each of x, got " + shape_text(state));
  require_shape(op, "state", state, {state.size(0), p.dim, p.states});
  p.initial = {state.data_ptr(), dtype_of(state), state_slots(op, state_indices, x.size(0), state.size(0))};
  p.final = p.initial;
  Tensor out = new_tensor(x, {x.size(0), p.dim});
  if (state_indices.has_value()) torch::stable::zero_(out);
  p.out = series(step(out));
  LCORE_RUN(selective_scan, x, p)
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(Tensor dout, OptionalTensor dfinal, Tensor u, Tensor delta, Tensor a, Tensor b,
                                  Tensor c, OptionalTensor d, OptionalTensor z, OptionalTensor delta_bias,
                                  bool delta_softplus, OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                  Tensor checkpoints) {
  const char* op = "selective_scan_backward";
  SelectiveScanGradParams g{};
  g.forward = scan_params(op, u, delta, a, b, c, d, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  const SelectiveScanParams& p = g.forward;
  const ScalarType wide = wide_type(u);
  require_float(op, "dout", dout, u);
  require_shape(op, "dout", dout, {u.size(0), u.size(1), u.size(2)});
  require_dense(op, "dfinal", dfinal, wide, {p.sequences.count, p.dim, p.states});
  require_dense(op, "checkpoints (of a forward with keep=True)", checkpoints, wide,
                {chunk_slots(p.sequences), p.states, p.dim});
  g.forward.checkpoints = checkpoints.data_ptr();
  g.dout = series(dout);
  g.dfinal = data_or_null(dfinal);
  Tensor du = empty_as(u), ddelta = empty_as(delta);
  Tensor dz = z.has_value() ? empty_as(*z) : new_tensor(u, {0});
  Tensor db = new_tensor(b, {b.sizes().begin(), b.sizes().end()});
  Tensor dc = new_tensor(c, {c.sizes().begin(), c.sizes().end()});
  Tensor da = new_tensor(a, {p.dim, p.states});
  Tensor dd = new_tensor(a, {d.has_value() ? p.dim : 0});
  Tensor dbias = new_tensor(a, {delta_bias.has_value() ? p.dim : 0});
  Tensor dinitial = new_tensor(a, {initial_state.has_value() ? p.sequences.count : 0, p.dim, p.states});
  for (Tensor* tensor : {&du, &ddelta, &dz, &db, &dc}) zero_unused(p.sequences, *tensor);
  g.du = series(du);
  g.ddelta = series(ddelta);
  if (z.has_value()) g.dz = series(dz);
  g.db = series(db);
  g.dc = series(dc);
  g.da = da.data_ptr();
  g.dd = d.has_value() ? dd.data_ptr() : nullptr;
  g.ddelta_bias = delta_bias.has_value() ? dbias.data_ptr() : nullptr;
  g.dinitial = initial_state.has_value() ? dinitial.data_ptr() : nullptr;
  LCORE_RUN(selective_scan_backward, u, g)
  return {du, ddelta, da, db, dc, dd, dz, dbias, dinitial};
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None,"
      " Tensor? delta_bias=None, bool delta_softplus=False, Tensor? initial_state=None, Tensor? cu_seqlens=None,"
      " bool keep=True) -> (Tensor out, Tensor final_state, Tensor checkpoints)");
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None,"
      " Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=False, Tensor? state_indices=None) -> Tensor");
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dfinal, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,"
      " Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? cu_seqlens,"
      " Tensor checkpoints) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz,"
      " Tensor ddelta_bias, Tensor dinitial)");
}

LCORE_KERNELS(m) {
  m.impl<lcore::selective_scan>("selective_scan");
  m.impl<lcore::selective_state_update>("selective_state_update");
  m.impl<lcore::selective_scan_backward>("selective_scan_backward");
}
