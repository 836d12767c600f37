#include <algorithm>

#include "cpu/kernels.h"
#include "torch/attention_params.h"
#include "torch/linear_attention.h"

namespace lcore {

using torch::headeronly::ScalarType;

namespace {

constexpr const char* kOp = "_linear_attention";

ScalarType state_type(const Tensor& q) { return lse_type(q); }

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

bool has_shape(const Tensor& t, const std::vector<int64_t>& shape) { return shape_of(t) == shape; }

// What has one number a head and token, or with `channels` one for each key channel: (batch, seq, heads[, key_dim]).
// Tensors with `packed` have no batch.
Strided numbers(const char* name, const Tensor& t, const LinearAttentionParams& p, bool packed, bool channels) {
  std::vector<int64_t> shape = {p.seq, p.heads};
  if (!packed) shape.insert(shape.begin(), p.batch);
  if (channels) shape.push_back(p.key_dim);
  require((dtype_of(t) == DType::kFloat64) == (p.type == DType::kFloat64), kOp,
          std::string(name) + " must be float64 where q is, and only there");
  require(t.is_cpu() && has_shape(t, shape), kOp,
          std::string(name) + " must have one number a token and head, or for g one a key channel, got shape " +
              shape_text(t));
  const auto strides = t.strides();
  const int seq = packed ? 0 : 1;
  return {t.data_ptr(), packed ? 0 : strides[0], strides[seq], strides[seq + 1], channels ? strides[seq + 2] : 0};
}

// A tensor with rows of its own for every head of v.
Strided rows(const char* name, const Tensor& t, const Tensor& v, int64_t dim) {
  std::vector<int64_t> shape = shape_of(v);
  shape.back() = dim;
  require(t.is_cpu() && has_shape(t, shape) && t.scalar_type() == v.scalar_type(), kOp,
          std::string(name) + " must have v's dtype, tokens and heads, got " + shape_text(t));
  return strided(t);
}

// Contiguous (heads, dim) of the states' type.
const void* of_heads(const char* name, const Tensor& t, const Tensor& q, int64_t heads, int64_t dim) {
  require(t.is_cpu() && t.is_contiguous() && t.scalar_type() == state_type(q) && has_shape(t, {heads, dim}), kOp,
          std::string(name) + " must be contiguous with a row for each head, got " + shape_text(t));
  return t.data_ptr();
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

}  // namespace

LinearAttentionParams LinearAttentionInputs::params() const {
  const bool packed = cu_seqlens.has_value();
  const int64_t rank = packed ? 3 : 4;
  require(q.is_cpu() && k.is_cpu() && v.is_cpu() && q.dim() == rank && k.dim() == rank && v.dim() == rank, kOp,
          "q, k and v must be on the CPU with 4 dimensions, with cu_seqlens 3");
  require(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), kOp,
          "q, k and v must have one dtype");
  require(has_shape(k, shape_of(q)), kOp, "k must have q's shape, got " + shape_text(k));
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
  if (bonus.has_value()) p.bonus = of_heads("bonus", *bonus, q, p.heads, p.key_dim);
  require(a.has_value() == b.has_value(), kOp, "a and b must be given together");
  if (a.has_value()) {
    require(p.per_channel && p.heads == p.qk_heads && !beta.has_value() && !bonus.has_value(), kOp,
            "a and b need a decay for each channel and as many heads of q, and go without beta and bonus");
    p.a = rows("a", *a, v, p.key_dim);
    p.b = rows("b", *b, v, p.key_dim);
  }
  if (skip.has_value()) p.skip = of_heads("skip", *skip, q, p.heads, p.value_dim);
  if (gate.has_value()) p.gate = rows("gate", *gate, v, p.value_dim);
  p.scale = scale;
  p.initial_state = state_data("initial_state", initial_state, q, p, p.value_dim);
  return p;
}

const void* state_data(const char* name, const OptionalTensor& state, const Tensor& q, const LinearAttentionParams& p,
                       int value_dim) {
  if (!state.has_value()) return nullptr;
  std::vector<int64_t> shape = {p.batch, p.heads, p.key_dim};
  if (value_dim > 0) shape.push_back(value_dim);
  require(
      state->is_cpu() && state->is_contiguous() && state->scalar_type() == state_type(q) && has_shape(*state, shape),
      kOp,
      std::string(name) + " must be contiguous of shape (sequences, heads, key_dim, value_dim), got " +
          shape_text(*state));
  return state->data_ptr();
}

Tensor new_rows(const Tensor& like, bool packed) {
  Tensor rows = new_tensor(like, shape_of(like));
  if (packed) torch::stable::zero_(rows);
  return rows;
}

Tensor new_states(const Tensor& q, const LinearAttentionParams& p) {
  return new_tensor(q, {p.batch, p.heads, p.key_dim, p.value_dim}, state_type(q));
}

LinearAttentionGradients linear_attention_gradients(const LinearAttentionInputs& in, const Tensor& dout,
                                                    LinearAttentionGradParams& grads) {
  const LinearAttentionParams& p = grads.forward;
  require(dout.is_cpu() && has_shape(dout, shape_of(in.v)) && dtype_of(dout) == p.type, kOp,
          "dout must have the shape and dtype of out, got " + shape_text(dout));
  const bool packed = in.cu_seqlens.has_value();
  const ScalarType wide = state_type(in.q);
  const auto optional_rows = [&](const OptionalTensor& t) {
    return t.has_value() ? new_rows(*t, packed) : new_tensor(in.q, {0});
  };
  LinearAttentionGradients d{
      .q = new_rows(in.q, packed),
      .k = new_rows(in.k, packed),
      .v = new_rows(in.v, packed),
      .g = new_rows(in.g, packed),
      .beta = optional_rows(in.beta),
      .weight = optional_rows(in.weight),
      .bonus = new_tensor(in.q, {in.bonus.has_value() ? p.batch : 0, p.heads, p.key_dim}, wide),
      .a = optional_rows(in.a),
      .b = optional_rows(in.b),
      .skip = new_tensor(in.q, {in.skip.has_value() ? p.batch : 0, p.heads, p.value_dim}, wide),
      .gate = optional_rows(in.gate),
      .initial_state = in.initial_state.has_value() ? new_rows(*in.initial_state, false) : new_tensor(in.q, {0}, wide)};
  const auto data = [](const Tensor& gradient, bool given) { return given ? gradient.data_ptr() : nullptr; };
  grads.dout = strided(dout);
  grads.dq = d.q.data_ptr();
  grads.dk = d.k.data_ptr();
  grads.dv = d.v.data_ptr();
  grads.dg = d.g.data_ptr();
  grads.dbeta = data(d.beta, in.beta.has_value());
  grads.dweight = data(d.weight, in.weight.has_value());
  grads.dbonus = data(d.bonus, in.bonus.has_value());
  grads.da = data(d.a, in.a.has_value());
  grads.db = data(d.b, in.b.has_value());
  grads.dskip = data(d.skip, in.skip.has_value());
  grads.dgate = data(d.gate, in.gate.has_value());
  grads.dinitial_state = data(d.initial_state, in.initial_state.has_value());
  const int64_t tokens = p.seq * (packed ? 1 : p.batch);
  const int64_t shared = p.heads == p.qk_heads ? 0 : tokens * p.heads / heads_together(p) * p.key_dim;
  Tensor dq_of_heads = new_tensor(in.q, {shared}, wide), dk_of_heads = new_tensor(in.q, {shared}, wide);
  grads.dq_of_heads = dq_of_heads.data_ptr();
  grads.dk_of_heads = dk_of_heads.data_ptr();
  TorchExecutor executor;
  cpu::kernels().linear_attention_backward(grads, executor);
  return d;
}

Tensor with_seq(const Tensor& t) { return torch::stable::unsqueeze(t, 1); }
OptionalTensor with_seq(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(with_seq(*t)) : t; }

const int64_t* step_slots(const Tensor& state, const OptionalTensor& state_indices, const LinearAttentionParams& p) {
  require(state.is_cpu() && state.is_contiguous() && state.dim() == 4 && state.size(1) == p.heads &&
              state.size(2) == p.key_dim && state.size(3) == p.value_dim &&
              dtype_of(state) == (p.type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32),
          kOp, "state must be contiguous of shape (slots, heads, key_dim, value_dim), got " + shape_text(state));
  const int64_t* slots = nullptr;
  if (state_indices.has_value()) {
    require(state_indices->is_cpu() && state_indices->is_contiguous() && state_indices->dim() == 1 &&
                state_indices->scalar_type() == ScalarType::Long && state_indices->size(0) == p.batch,
            kOp, "state_indices must be contiguous int64 of shape (batch,)");
    slots = static_cast<const int64_t*>(state_indices->data_ptr());
  }
  std::vector<bool> taken(static_cast<size_t>(state.size(0)));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = slots == nullptr ? b : slots[b];
    if (slot < 0) continue;
    require(slot < state.size(0) && !taken[slot], kOp,
            "state_indices must name each slot once, below " + std::to_string(state.size(0)));
    taken[slot] = true;
  }
  return slots;
}

}  // namespace lcore
