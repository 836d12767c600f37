// The tensors of ops that run the kernels of linear attention, checked and as kernels see them.
#pragma once

#include <vector>

#include "core/linear_attention.h"
#include "torch/library.h"

namespace lcore {

// As in LinearAttentionParams, packed with cu_seqlens. The tensors must outlive the parameters.
struct LinearAttentionInputs {
  const Tensor &q, &k, &v, &g;
  double scale = 1;
  OptionalTensor initial_state{}, cu_seqlens{}, beta{}, weight{}, bonus{}, a{}, b{}, skip{}, gate{};

  // Without what is written: out, states and gradients.
  LinearAttentionParams params() const;
};

// The rows of an output, contiguous: zero where tokens may belong to no sequence.
Tensor new_rows(const Tensor& like, bool packed);

// Contiguous, of the states' type, (sequences, heads, key_dim, value_dim), or without value_dim where that is 0.
const void* state_data(const char* name, const OptionalTensor& state, const Tensor& q, const LinearAttentionParams& p,
                       int value_dim);
Tensor new_states(const Tensor& q, const LinearAttentionParams& p);

// Gradients of q, k, v, g and of what is given of the rest; of what is not they are empty. Those of bonus and of skip
// have a row for each sequence.
struct LinearAttentionGradients {
  Tensor q, k, v, g, beta, weight, bonus, a, b, skip, gate, initial_state;
};
LinearAttentionGradients linear_attention_gradients(const LinearAttentionInputs& inputs, const Tensor& dout,
                                                    LinearAttentionGradParams& grads);

// A token's tensor (batch, heads[, dim]) with a dimension of 1 for the sequence.
Tensor with_seq(const Tensor& t);
OptionalTensor with_seq(const OptionalTensor& t);

// The slot of each row among the states, each at most once; nullptr: row i has slot i.
const int64_t* step_slots(const Tensor& state, const OptionalTensor& state_indices, const LinearAttentionParams& p);

}  // namespace lcore
