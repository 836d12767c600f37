// lcore::rwkv4_wkv, its backward and its step on CPU tensors.
#include "core/rwkv4_wkv.h"

#include "cpu/kernels.h"
#include "torch/recurrent.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;
constexpr const char* kOp = "rwkv4_wkv";

// (batch, len, dim), or packed (tokens, dim), as (batch, dim, len).
Series channels(const Tensor& t) {
  const bool packed = t.dim() == 2;
  return {t.data_ptr(), dtype_of(t), packed ? 0 : t.stride(0), t.stride(t.dim() - 1), t.stride(t.dim() - 2)};
}

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

Rwkv4Params wkv_params(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  const int64_t rank = cu_seqlens.has_value() ? 2 : 3;
  require(k.is_cpu() && k.dim() == rank, kOp, "k must be on the CPU with 3 dimensions, packed 2, got " + shape_text(k));
  require_float(kOp, "k", k, k);
  require_float(kOp, "v", v, k);
  require_shape(kOp, "v", v, shape_of(k));
  Rwkv4Params p{};
  p.dim = k.size(rank - 1);
  p.sequences = sequences(kOp, cu_seqlens, rank == 3 ? k.size(0) : 1, k.size(rank - 2));
  p.is_double = wide_type(k) == ScalarType::Double;
  require_dense(kOp, "w", w, wide_type(k), {p.dim});
  require_dense(kOp, "u", u, wide_type(k), {p.dim});
  require_dense(kOp, "initial_state", initial_state, wide_type(k), {p.sequences.count, 3, p.dim});
  p.w = w.data_ptr();
  p.u = u.data_ptr();
  p.k = channels(k);
  p.v = channels(v);
  p.initial = {data_or_null(initial_state), dtype_of(w), nullptr};
  return p;
}

std::tuple<Tensor, Tensor> rwkv4_wkv(Tensor w, Tensor u, Tensor k, Tensor v, OptionalTensor initial_state,
                                     OptionalTensor cu_seqlens) {
  Rwkv4Params p = wkv_params(w, u, k, v, initial_state, cu_seqlens);
  Tensor out = new_tensor(v, shape_of(v)), state = new_tensor(w, {p.sequences.count, 3, p.dim});
  zero_unused(p.sequences, out);
  p.out = channels(out);
  p.final = {state.data_ptr(), dtype_of(w), nullptr};
  TorchExecutor executor;
  cpu::kernels().rwkv4_wkv(p, executor);
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rwkv4_wkv_backward(Tensor dout, OptionalTensor dstate, Tensor w,
                                                                      Tensor u, Tensor k, Tensor v,
                                                                      OptionalTensor initial_state,
                                                                      OptionalTensor cu_seqlens) {
  Rwkv4GradParams g{};
  g.forward = wkv_params(w, u, k, v, initial_state, cu_seqlens);
  const Rwkv4Params& p = g.forward;
  const std::vector<int64_t> states = {p.sequences.count, 3, p.dim};
  require_float(kOp, "dout", dout, k);
  require_shape(kOp, "dout", dout, shape_of(v));
  require_dense(kOp, "dstate", dstate, wide_type(k), states);
  Tensor dw = new_tensor(w, {p.dim}), du = new_tensor(u, {p.dim});
  Tensor dk = new_tensor(k, shape_of(k)), dv = new_tensor(v, shape_of(v));
  zero_unused(p.sequences, dk);
  zero_unused(p.sequences, dv);
  Tensor dinitial = new_tensor(w, {initial_state.has_value() ? states[0] : 0, 3, p.dim});
  g.dout = channels(dout);
  g.dfinal = data_or_null(dstate);
  g.dk = channels(dk);
  g.dv = channels(dv);
  g.dw = dw.data_ptr();
  g.du = du.data_ptr();
  g.dinitial = initial_state.has_value() ? dinitial.data_ptr() : nullptr;
  TorchExecutor executor;
  cpu::kernels().rwkv4_wkv_backward(g, executor);
  return {dw, du, dk, dv, dinitial};
}

Tensor rwkv4_wkv_update(Tensor state, Tensor w, Tensor u, Tensor k, Tensor v, OptionalTensor state_indices) {
  require(k.dim() == 2 && v.dim() == 2, kOp, "k must have shape (batch, dim), got " + shape_text(k));
  Rwkv4Params p = wkv_params(w, u, torch::stable::unsqueeze(k, 1), torch::stable::unsqueeze(v, 1), {}, {});
  require(state.dim() == 3 && (state_indices.has_value() || state.size(0) == k.size(0)), kOp,
          "state must have a row for each of k, got " + shape_text(state));
  require_dense(kOp, "state", state, wide_type(k), {state.size(0), 3, p.dim});
  p.initial = {state.data_ptr(), dtype_of(w), state_slots(kOp, state_indices, k.size(0), state.size(0))};
  p.final = p.initial;
  Tensor out = new_tensor(v, shape_of(v));
  if (state_indices.has_value()) torch::stable::zero_(out);
  p.out = channels(torch::stable::unsqueeze(out, 1));
  TorchExecutor executor;
  cpu::kernels().rwkv4_wkv(p, executor);
  return out;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def(
      "_rwkv4_wkv(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state=None, Tensor? cu_seqlens=None)"
      " -> (Tensor out, Tensor final_state)");
  m.def(
      "_rwkv4_wkv_backward(Tensor dout, Tensor? dstate, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor dw, Tensor du, Tensor dk, Tensor dv, Tensor dinitial_state)");
  m.def(
      "_rwkv4_wkv_update(Tensor(a!) state, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state_indices=None)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("_rwkv4_wkv", LCORE_BOX(lcore::rwkv4_wkv));
  m.impl("_rwkv4_wkv_backward", LCORE_BOX(lcore::rwkv4_wkv_backward));
  m.impl("_rwkv4_wkv_update", LCORE_BOX(lcore::rwkv4_wkv_update));
}
