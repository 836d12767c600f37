// lcore::mlstm, its backward and its step, on CPU tensors: gates (csrc/cpu/mlstm/), then linear attention.
#include "core/mlstm.h"

#include "cpu/kernels.h"
#include "torch/linear_attention.h"
#include "torch/recurrent.h"

namespace lcore {
namespace {

constexpr const char* kOp = "mlstm";

// (batch, seq, heads), or packed (tokens, heads).
Series gate(const Tensor& t) {
  const bool packed = t.dim() == 2;
  return {t.data_ptr(), dtype_of(t), packed ? 0 : t.stride(0), t.stride(t.dim() - 1), t.stride(t.dim() - 2)};
}

// What gates make of i and f.
struct Gates {
  MlstmGateParams params{};
  Tensor g, weight, m;

  Gates(const Tensor& q, const Tensor& v, const Tensor& i, const Tensor& f, const OptionalTensor& initial_m,
        const OptionalTensor& cu_seqlens)
      : g(numbers(q, i)), weight(numbers(q, i)), m(numbers(q, i)) {
    require(v.dim() >= 3, kOp, "v must have 4 dimensions, with cu_seqlens 3");
    const std::vector<int64_t> shape(v.sizes().begin(), v.sizes().end() - 1);
    const bool packed = v.dim() == 3;
    const int64_t batch = packed ? 1 : shape[0];
    for (const auto& [name, t] : {std::pair{"i", &i}, std::pair{"f", &f}}) {
      require_float(kOp, name, *t, q);
      require_shape(kOp, name, *t, shape);
    }
    params.is_double = wide_type(q) == torch::headeronly::ScalarType::Double;
    params.sequences = sequences(kOp, cu_seqlens, batch, shape[shape.size() - 2]);
    params.heads = shape.back();
    require_dense(kOp, "the initial m", initial_m, wide_type(q), {params.sequences.count, params.heads});
    params.i = gate(i);
    params.f = gate(f);
    params.g = gate(g);
    params.weight = gate(weight);
    params.m = gate(m);
    params.initial = {data_or_null(initial_m), dtype_of(m), nullptr};
  }

  static Tensor numbers(const Tensor& q, const Tensor& i) {
    return new_tensor(q, {i.sizes().begin(), i.sizes().end()}, wide_type(q));
  }

  // Writes g, weight, m, and the m of each sequence's end to final_m.
  void run(const Tensor& final_m) {
    params.final = {final_m.data_ptr(), dtype_of(final_m), params.initial.slots};
    TorchExecutor executor;
    cpu::kernels().mlstm_gates(params, executor);
  }

  LinearAttentionInputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                               const OptionalTensor& state, const OptionalTensor& cu_seqlens) const {
    return {.q = q,
            .k = k,
            .v = v,
            .g = g,
            .scale = scale,
            .initial_state = state,
            .cu_seqlens = cu_seqlens,
            .weight = weight};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, double scale,
                                                 OptionalTensor initial_c, OptionalTensor initial_n,
                                                 OptionalTensor initial_m, OptionalTensor cu_seqlens) {
  Gates gates(q, v, i, f, initial_m, cu_seqlens);
  Tensor final_m = new_tensor(q, {gates.params.sequences.count, gates.params.heads}, wide_type(q));
  gates.run(final_m);
  LinearAttentionParams p = gates.inputs(q, k, v, scale, initial_c, cu_seqlens).params();
  require(initial_c.has_value() == initial_n.has_value() && initial_c.has_value() == initial_m.has_value(), kOp,
          "an initial state has C, n and m");
  Tensor out = new_rows(v, cu_seqlens.has_value()), c = new_states(q, p);
  Tensor n = new_tensor(q, {p.batch, p.heads, p.key_dim}, wide_type(q));
  p.stabilizer = gates.m.data_ptr();
  p.initial_norm = state_data("the initial n", initial_n, q, p, 0);
  p.out = out.data_ptr();
  p.final_state = c.data_ptr();
  p.final_norm = n.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention(p, executor);
  return {out, c, n, final_m};
}

// dm: of the final m, given what C and n hold. dinitial_m: without what the initial C and n hold.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlstm_backward(
    Tensor dout, OptionalTensor dc, OptionalTensor dn, OptionalTensor dm, Tensor q, Tensor k, Tensor v, Tensor i,
    Tensor f, double scale, OptionalTensor initial_c, OptionalTensor initial_n, OptionalTensor initial_m,
    OptionalTensor cu_seqlens) {
  Gates gates(q, v, i, f, initial_m, cu_seqlens);
  const std::vector<int64_t> heads = {gates.params.sequences.count, gates.params.heads};
  gates.run(new_tensor(q, heads, wide_type(q)));
  const LinearAttentionInputs inputs = gates.inputs(q, k, v, scale, initial_c, cu_seqlens);
  LinearAttentionGradParams grads{};
  LinearAttentionParams& p = grads.forward;
  p = inputs.params();
  p.stabilizer = gates.m.data_ptr();
  p.initial_norm = state_data("the initial n", initial_n, q, p, 0);
  grads.dfinal_state = state_data("dC", dc, q, p, p.value_dim);
  grads.dfinal_norm = state_data("dn", dn, q, p, 0);
  const bool given = initial_c.has_value();
  Tensor dinitial_n = new_tensor(q, {given ? p.batch : 0, p.heads, p.key_dim}, wide_type(q));
  grads.dinitial_norm = dinitial_n.data_ptr();
  const LinearAttentionGradients d = linear_attention_gradients(inputs, dout, grads);

  require_dense(kOp, "dm", dm, wide_type(q), heads);
  const bool packed = cu_seqlens.has_value();
  Tensor di = new_rows(i, packed), df = new_rows(f, packed);
  Tensor dinitial_m = new_tensor(q, {given ? heads[0] : 0, heads[1]}, wide_type(q));
  MlstmGateGradParams gate_grads{.forward = gates.params,
                                 .dg = gate(d.g),
                                 .dweight = gate(d.weight),
                                 .dm = data_or_null(dm),
                                 .di = gate(di),
                                 .df = gate(df),
                                 .dm_initial = given ? dinitial_m.data_ptr() : nullptr};
  TorchExecutor executor;
  cpu::kernels().mlstm_gates_backward(gate_grads, executor);
  return {d.q, d.k, d.v, di, df, d.initial_state, dinitial_n, dinitial_m};
}

Tensor mlstm_update(Tensor c, Tensor n, Tensor m, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, double scale,
                    OptionalTensor state_indices) {
  require(q.dim() == 3 && v.dim() == 3, kOp, "q must have shape (batch, heads, key_dim), got " + shape_text(q));
  const Tensor q1 = with_seq(q), k1 = with_seq(k), v1 = with_seq(v);
  Gates gates(q1, v1, with_seq(i), with_seq(f), {}, {});
  LinearAttentionStepParams step{};
  step.token = gates.inputs(q1, k1, v1, scale, {}, {}).params();
  const LinearAttentionParams& p = step.token;
  step.slots = step_slots(c, state_indices, p);
  require_dense(kOp, "n", n, wide_type(q), {c.size(0), p.heads, p.key_dim});
  require_dense(kOp, "m", m, wide_type(q), {c.size(0), p.heads});
  gates.params.initial = {m.data_ptr(), dtype_of(m), step.slots};
  gates.run(m);
  step.token.stabilizer = gates.m.data_ptr();
  step.state = c.data_ptr();
  step.norm = n.data_ptr();
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
      "_mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, float scale, Tensor? initial_c=None,"
      " Tensor? initial_n=None, Tensor? initial_m=None, Tensor? cu_seqlens=None)"
      " -> (Tensor out, Tensor c, Tensor n, Tensor m)");
  m.def(
      "_mlstm_backward(Tensor dout, Tensor? dc, Tensor? dn, Tensor? dm, Tensor q, Tensor k, Tensor v, Tensor i,"
      " Tensor f, float scale, Tensor? initial_c, Tensor? initial_n, Tensor? initial_m, Tensor? cu_seqlens)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dinitial_c, Tensor dinitial_n,"
      " Tensor dinitial_m)");
  m.def(
      "_mlstm_update(Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f,"
      " float scale, Tensor? state_indices=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("_mlstm", LCORE_BOX(lcore::mlstm));
  m.impl("_mlstm_backward", LCORE_BOX(lcore::mlstm_backward));
  m.impl("_mlstm_update", LCORE_BOX(lcore::mlstm_update));
}
