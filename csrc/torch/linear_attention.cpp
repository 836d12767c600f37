// lcore::_linear_attention, its backward and its step for one token, on CPU tensors: what gated_linear_attention,
// gated_delta_rule, rwkv6, rwkv7 and ssd run.
#include "torch/linear_attention.h"

#include "cpu/kernels.h"

namespace lcore {
namespace {

std::tuple<Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, double scale,
                                            OptionalTensor initial_state, OptionalTensor cu_seqlens,
                                            OptionalTensor beta, OptionalTensor weight, OptionalTensor bonus,
                                            OptionalTensor a, OptionalTensor b, OptionalTensor skip,
                                            OptionalTensor gate) {
  const LinearAttentionInputs inputs{q,    k,      v,     g, scale, initial_state, cu_seqlens,
                                     beta, weight, bonus, a, b,     skip,          gate};
  LinearAttentionParams p = inputs.params();
  Tensor out = new_rows(v, cu_seqlens.has_value()), state = new_states(q, p);
  p.out = out.data_ptr();
  p.final_state = state.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention(p, executor);
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
linear_attention_backward(Tensor dout, OptionalTensor dstate, Tensor q, Tensor k, Tensor v, Tensor g, double scale,
                          OptionalTensor initial_state, OptionalTensor cu_seqlens, OptionalTensor beta,
                          OptionalTensor weight, OptionalTensor bonus, OptionalTensor a, OptionalTensor b,
                          OptionalTensor skip, OptionalTensor gate) {
  const LinearAttentionInputs inputs{q,    k,      v,     g, scale, initial_state, cu_seqlens,
                                     beta, weight, bonus, a, b,     skip,          gate};
  LinearAttentionGradParams grads{};
  grads.forward = inputs.params();
  grads.dfinal_state = state_data("dstate", dstate, q, grads.forward, grads.forward.value_dim);
  const LinearAttentionGradients d = linear_attention_gradients(inputs, dout, grads);
  return {d.q, d.k, d.v, d.g, d.beta, d.weight, d.bonus, d.a, d.b, d.skip, d.gate, d.initial_state};
}

Tensor linear_attention_update(Tensor state, Tensor q, Tensor k, Tensor v, Tensor g, double scale,
                               OptionalTensor state_indices, OptionalTensor beta, OptionalTensor bonus,
                               OptionalTensor a, OptionalTensor b) {
  require(q.dim() == 3, "_linear_attention", "q must have shape (batch, qk_heads, key_dim), got " + shape_text(q));
  const Tensor q1 = with_seq(q), k1 = with_seq(k), v1 = with_seq(v), g1 = with_seq(g);
  const LinearAttentionInputs inputs{.q = q1,
                                     .k = k1,
                                     .v = v1,
                                     .g = g1,
                                     .scale = scale,
                                     .beta = with_seq(beta),
                                     .bonus = bonus,
                                     .a = with_seq(a),
                                     .b = with_seq(b)};
  LinearAttentionStepParams step{};
  step.token = inputs.params();
  step.slots = step_slots(state, state_indices, step.token);
  step.state = state.data_ptr();
  Tensor out = new_rows(v, false);
  step.token.out = out.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention_step(step, executor);
  return out;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def(
      "_linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state=None,"
      " Tensor? cu_seqlens=None, Tensor? beta=None, Tensor? weight=None, Tensor? bonus=None, Tensor? a=None,"
      " Tensor? b=None, Tensor? skip=None, Tensor? gate=None) -> (Tensor out, Tensor final_state)");
  m.def(
      "_linear_attention_backward(Tensor dout, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor g, float scale,"
      " Tensor? initial_state, Tensor? cu_seqlens, Tensor? beta, Tensor? weight, Tensor? bonus, Tensor? a, Tensor? b,"
      " Tensor? skip, Tensor? gate) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dweight,"
      " Tensor dbonus, Tensor da, Tensor db, Tensor dskip, Tensor dgate, Tensor dinitial_state)");
  m.def(
      "_linear_attention_update(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, float scale,"
      " Tensor? state_indices=None, Tensor? beta=None, Tensor? bonus=None, Tensor? a=None, Tensor? b=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("_linear_attention", LCORE_BOX(lcore::linear_attention));
  m.impl("_linear_attention_backward", LCORE_BOX(lcore::linear_attention_backward));
  m.impl("_linear_attention_update", LCORE_BOX(lcore::linear_attention_update));
}
