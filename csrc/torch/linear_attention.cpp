// lcore::_linear_attention, its backward and its step for one token, on CPU tensors: what gated_linear_attention,
// gated_delta_rule, rwkv6 and ssd run.
#include "core/linear_attention.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "torch/attention_params.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;
constexpr const char* kOp = "_linear_attention";

ScalarType state_type(const Tensor& q) { return lse_type(q); }

// What has one number a head and token, or with `channels` one for each key channel: (batch, seq, heads[, key_dim]).
// Tensors with `packed` have no batch.
Strided numbers(const char* name, const Tensor& t, const LinearAttentionParams& p, bool packed, bool channels) {
  std::vector<int64_t> shape = {p.seq, p.heads};
  if (!packed) shape.insert(shape.begin(), p.batch);
  if (channels) shape.push_back(p.key_dim);
  require(t.is_cpu() && std::equal(t.sizes().begin(), t.sizes().end(), shape.begin(), shape.end()), kOp,
          std::string(name) + " must have one number a token and head, or for g one a key channel, got shape " +
              shape_text(t));
  const auto strides = t.strides();
  const int seq = packed ? 0 : 1;
  return {t.data_ptr(), packed ? 0 : strides[0], strides[seq], strides[seq + 1], channels ? strides[seq + 2] : 0};
}

const int32_t* offsets(const OptionalTensor& cu, int64_t tokens) {
  if (!cu.has_value()) return nullptr;
  require(
      cu->is_cpu() && cu->is_contiguous() && cu->scalar_type() == ScalarType::Int && cu->dim() == 1 && cu->size(0) >= 1,
      kOp, "cu_seqlens must be contiguous int32 of shape (sequences + 1,)");
  const auto* values = static_cast<const int32_t*>(cu->data_ptr());
  bool valid = values[0] == 0 && values[cu->size(0) - 1] <= tokens;
  for (int64_t i = 0; i + 1 < cu->size(0); ++i) valid = valid && values[i] <= values[i + 1];
  require(valid, kOp, "cu_seqlens must rise from 0 to at most " + std::to_string(tokens) + " tokens");
  return values;
}

const void* state_data(const char* name, const OptionalTensor& state, const Tensor& q, const LinearAttentionParams& p) {
  if (!state.has_value()) return nullptr;
  const std::vector<int64_t> shape = {p.batch, p.heads, p.key_dim, p.value_dim};
  require(state->is_cpu() && state->is_contiguous() && state->scalar_type() == state_type(q) &&
              std::equal(state->sizes().begin(), state->sizes().end(), shape.begin(), shape.end()),
          kOp,
          std::string(name) + " must be contiguous of shape (sequences, heads, key_dim, value_dim), got " +
              shape_text(*state));
  return state->data_ptr();
}

LinearAttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                             const OptionalTensor& beta, const OptionalTensor& weight, const OptionalTensor& bonus,
                             double scale, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                             bool wide) {
  const bool packed = cu_seqlens.has_value();
  const int64_t rank = packed ? 3 : 4;
  require(q.is_cpu() && k.is_cpu() && v.is_cpu() && q.dim() == rank && k.dim() == rank && v.dim() == rank, kOp,
          "q, k and v must be on the CPU with 4 dimensions, with cu_seqlens 3");
  require(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kOp,
          "q, k and v must have one dtype");
  require(std::equal(q.sizes().begin(), q.sizes().end(), k.sizes().begin(), k.sizes().end()), kOp,
          "k must have q's shape, got " + shape_text(k));
  require(v.size(0) == q.size(0) && v.size(rank - 3) == q.size(rank - 3), kOp,
          "v must have q's batch and tokens, got " + shape_text(v));
  LinearAttentionParams p{};
  p.type = dtype_of(q);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.batch = packed ? cu_seqlens->size(0) - 1 : q.size(0);
  p.seq = q.size(rank - 3);
  p.heads = v.size(rank - 2);
  p.qk_heads = q.size(rank - 2);
  require(p.qk_heads > 0 && p.heads % p.qk_heads == 0, kOp, "v's heads must be a multiple of q's");
  p.key_dim = static_cast<int>(q.size(rank - 1));
  p.value_dim = static_cast<int>(v.size(rank - 1));
  require(p.key_dim >= 1 && p.key_dim <= kMostHeadDim && p.value_dim >= 1 && p.value_dim <= kMostHeadDim, kOp,
          "head sizes must lie in [1, " + std::to_string(kMostHeadDim) + "]");
  p.cu_seqlens = offsets(cu_seqlens, p.seq);
  p.per_channel = g.dim() == rank;
  p.g_type = dtype_of(g);
  p.g = numbers("g", g, p, packed, p.per_channel);
  if (beta.has_value()) {
    p.beta_type = dtype_of(*beta);
    p.beta = numbers("beta", *beta, p, packed, false);
  }
  if (weight.has_value()) {
    p.weight_type = dtype_of(*weight);
    p.weight = numbers("weight", *weight, p, packed, false);
  }
  if (bonus.has_value()) {
    require(bonus->is_cpu() && bonus->is_contiguous() && bonus->scalar_type() == state_type(q) && bonus->dim() == 2 &&
                bonus->size(0) == p.heads && bonus->size(1) == p.key_dim,
            kOp, "bonus must be contiguous of shape (heads, key_dim), got " + shape_text(*bonus));
    p.bonus = bonus->data_ptr();
  }
  p.scale = scale;
  p.initial_state = state_data("initial_state", initial_state, q, p);
  p.out_type = wide && p.type != DType::kFloat64 ? DType::kFloat32 : p.type;
  return p;
}

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Contiguous; zero where tokens may belong to no sequence.
Tensor new_rows(const Tensor& like, bool loose, std::optional<ScalarType> type = std::nullopt) {
  Tensor rows = new_tensor(like, shape_of(like), type);
  if (loose) torch::stable::zero_(rows);
  return rows;
}

std::tuple<Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, OptionalTensor beta,
                                            OptionalTensor weight, OptionalTensor bonus, double scale,
                                            OptionalTensor initial_state, OptionalTensor cu_seqlens, bool wide) {
  LinearAttentionParams p = params(q, k, v, g, beta, weight, bonus, scale, initial_state, cu_seqlens, wide);
  Tensor out = new_rows(v, cu_seqlens.has_value(), wide ? state_type(q) : v.scalar_type());
  Tensor state = new_tensor(q, {p.batch, p.heads, p.key_dim, p.value_dim}, state_type(q));
  p.out = out.data_ptr();
  p.final_state = state.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention(p, executor);
  return {out, state};
}

// Gradients of what there is none of, beta, weight, bonus and the initial state, are empty; that of bonus has a row for
// each sequence.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Tensor dout, OptionalTensor dstate, Tensor q, Tensor k, Tensor v, Tensor g, OptionalTensor beta,
    OptionalTensor weight, OptionalTensor bonus, double scale, OptionalTensor initial_state, OptionalTensor cu_seqlens,
    bool wide) {
  const LinearAttentionParams p = params(q, k, v, g, beta, weight, bonus, scale, initial_state, cu_seqlens, wide);
  require(dout.is_cpu() && std::equal(dout.sizes().begin(), dout.sizes().end(), v.sizes().begin(), v.sizes().end()) &&
              dtype_of(dout) == p.out_type,
          kOp, "dout must have the shape and dtype of out, got " + shape_text(dout));
  const bool loose = cu_seqlens.has_value();
  Tensor dq = new_rows(q, loose), dk = new_rows(k, loose), dv = new_rows(v, loose), dg = new_rows(g, loose);
  const auto optional_rows = [&](const OptionalTensor& t) {
    return t.has_value() ? new_rows(*t, loose) : new_tensor(q, {0});
  };
  Tensor dbeta = optional_rows(beta), dweight = optional_rows(weight);
  Tensor dbonus = new_tensor(q, {bonus.has_value() ? p.batch : 0, p.heads, p.key_dim}, state_type(q));
  Tensor dinitial = initial_state.has_value() ? new_rows(*initial_state, false) : new_tensor(q, {0}, state_type(q));
  LinearAttentionGradParams grads{};
  grads.forward = p;
  grads.dout = strided(dout);
  grads.dfinal_state = state_data("dstate", dstate, q, p);
  grads.dq = dq.data_ptr();
  grads.dk = dk.data_ptr();
  grads.dv = dv.data_ptr();
  grads.dg = dg.data_ptr();
  if (beta.has_value()) grads.dbeta = dbeta.data_ptr();
  if (weight.has_value()) grads.dweight = dweight.data_ptr();
  if (bonus.has_value()) grads.dbonus = dbonus.data_ptr();
  if (initial_state.has_value()) grads.dinitial_state = dinitial.data_ptr();
  const int64_t tokens = p.seq * (loose ? 1 : p.batch);
  const int64_t shared = p.heads == p.qk_heads ? 0 : tokens * p.heads / heads_together(p) * p.key_dim;
  Tensor dq_of_heads = new_tensor(q, {shared}, state_type(q)), dk_of_heads = new_tensor(q, {shared}, state_type(q));
  grads.dq_of_heads = dq_of_heads.data_ptr();
  grads.dk_of_heads = dk_of_heads.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention_backward(grads, executor);
  return {dq, dk, dv, dg, dbeta, dweight, dbonus, dinitial};
}

// A token's tensor (batch, heads[, dim]) with a dimension of 1 for the sequence.
Tensor with_seq(const Tensor& t) { return torch::stable::unsqueeze(t, 1); }
OptionalTensor with_seq(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(with_seq(*t)) : t; }

Tensor linear_attention_update(Tensor state, Tensor q, Tensor k, Tensor v, Tensor g, OptionalTensor beta,
                               OptionalTensor weight, OptionalTensor bonus, double scale, OptionalTensor state_indices,
                               bool wide) {
  require(q.dim() == 3, kOp, "q must have shape (batch, qk_heads, key_dim), got " + shape_text(q));
  const Tensor q1 = with_seq(q), k1 = with_seq(k), v1 = with_seq(v), g1 = with_seq(g);
  const OptionalTensor beta1 = with_seq(beta), weight1 = with_seq(weight);
  LinearAttentionStepParams step{params(q1, k1, v1, g1, beta1, weight1, bonus, scale, {}, {}, wide), state.data_ptr(),
                                 nullptr};
  LinearAttentionParams& p = step.token;
  require(state.is_cpu() && state.is_contiguous() && state.dim() == 4 && state.scalar_type() == state_type(q) &&
              state.size(1) == p.heads && state.size(2) == p.key_dim && state.size(3) == p.value_dim,
          kOp, "state must be contiguous of shape (slots, heads, key_dim, value_dim), got " + shape_text(state));
  if (state_indices.has_value()) {
    require(state_indices->is_cpu() && state_indices->is_contiguous() && state_indices->dim() == 1 &&
                state_indices->scalar_type() == ScalarType::Long && state_indices->size(0) == p.batch,
            kOp, "state_indices must be contiguous int64 of shape (batch,)");
    step.slots = static_cast<const int64_t*>(state_indices->data_ptr());
  }
  std::vector<bool> taken(static_cast<size_t>(state.size(0)));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = step.slots == nullptr ? b : step.slots[b];
    if (slot < 0) continue;
    require(slot < state.size(0) && !taken[slot], kOp,
            "state_indices must name each slot once, below " + std::to_string(state.size(0)));
    taken[slot] = true;
  }
  Tensor out = new_tensor(v, shape_of(v), wide ? state_type(q) : v.scalar_type());
  p.out = out.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention_step(step, executor);
  return out;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def(
      "_linear_attention(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor? weight, Tensor? bonus, float "
      "scale,"
      " Tensor? initial_state, Tensor? cu_seqlens, bool wide) -> (Tensor out, Tensor final_state)");
  m.def(
      "_linear_attention_backward(Tensor dout, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta,"
      " Tensor? weight, Tensor? bonus, float scale, Tensor? initial_state, Tensor? cu_seqlens, bool wide)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dweight, Tensor dbonus, Tensor "
      "dinitial_state)");
  m.def(
      "_linear_attention_update(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor? "
      "weight, Tensor? bonus,"
      " float scale, Tensor? state_indices, bool wide) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("_linear_attention", LCORE_BOX(lcore::linear_attention));
  m.impl("_linear_attention_backward", LCORE_BOX(lcore::linear_attention_backward));
  m.impl("_linear_attention_update", LCORE_BOX(lcore::linear_attention_update));
}
