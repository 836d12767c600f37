// What a linear attention kernel is told: pointers, sizes and element strides. No torch.
#pragma once

#include "core/attention.h"

namespace lcore {

// Of keys and of values.
inline constexpr int kMostHeadDim = 512;

struct LinearAttentionParams {
  DType type;  // of q, k, v
  Strided q;   // (batch, seq, qk_heads, key_dim)
  Strided k;
  Strided v;  // (batch, seq, heads, value_dim)
  DType g_type;
  Strided g;  // log-decay (batch, seq, heads), and with per_channel (batch, seq, heads, key_dim)
  bool per_channel;
  DType beta_type;
  Strided beta;  // (batch, seq, heads), or data nullptr: the delta rule's strength of writing
  DType weight_type;
  Strided weight;     // (batch, seq, heads), or data nullptr: factor of v
  const void* bonus;  // (heads, key_dim) contiguous, or nullptr; float, or double when type is float64. With it a query
                      // meets the state before its token, undecayed, and its own key times bonus
  Strided a;     // (batch, seq, heads, key_dim) of type, or data nullptr: what the state before a token holds under a
  Strided b;     // is written under b as well; with per_channel alone, and as many heads of q
  double scale;  // of q

  // What is read becomes y, the row of out:
  const void* skip;  // (heads, value_dim) contiguous of the states' type, or nullptr: y += skip v, v without weight
  Strided gate;      // as v, or data nullptr: y *= silu(gate)
  const void* stabilizer;  // m (batch, seq, heads) contiguous of the states' type, or nullptr: y /= max(|q^T n|, e^-m),
                           // n the state of a value that is always 1

  const void* initial_state;  // (batch, heads, key_dim, value_dim) contiguous, or nullptr
  void* final_state;          // the same; float, or double when type is float64
  const void* initial_norm;   // n (batch, heads, key_dim) contiguous, with stabilizer: beside initial_state
  void* final_norm;
  void* out;  // (batch, seq, heads, value_dim) contiguous, of type

  int64_t batch;  // sequences
  int64_t seq;    // tokens a sequence; with cu_seqlens the total of tokens
  int64_t heads;
  int64_t qk_heads;  // head h of v reads head h * qk_heads / heads of q and k
  int key_dim;
  int value_dim;
  const int32_t* cu_seqlens;  // [batch + 1] or nullptr
};

struct LinearAttentionGradParams {
  LinearAttentionParams forward;  // out and final_state are not read
  Strided dout;                   // (batch, seq, heads, value_dim) of type
  const void* dfinal_state;       // as final_state, or nullptr
  const void* dfinal_norm;        // as final_norm, or nullptr where dfinal_state is
  void* dq;                       // contiguous, shaped as q, k, v, g, beta, weight, in their types
  void* dk;
  void* dv;
  void* dg;
  void* dbeta;    // nullptr without beta
  void* dweight;  // nullptr without weight
  void* dbonus;   // (batch, heads, key_dim) of the states' type; nullptr without bonus
  void* da;       // contiguous, shaped as a; nullptr without a
  void* db;
  void* dskip;           // (batch, heads, value_dim) of the states' type; nullptr without skip
  void* dgate;           // contiguous, shaped as v; nullptr without gate
  void* dinitial_state;  // as initial_state, or nullptr
  void* dinitial_norm;
  // Where heads share q and k: (batch, seq, heads / heads_together, key_dim) of the states' type, to be added up.
  void* dq_of_heads;
  void* dk_of_heads;
};

// Heads of v that share q and k and whose gradients for them one worker adds up as it goes: the largest divisor of
// their number up to 4, so that memory for the shares stays small and work can still be spread.
inline int64_t heads_together(const LinearAttentionParams& p) {
  const int64_t group = p.heads / p.qk_heads;
  int64_t together = 4;
  while (group % together != 0) --together;
  return together;
}

struct LinearAttentionStepParams {
  LinearAttentionParams token;  // seq is 1; initial_state, final_state and cu_seqlens are not read
  void* state;                  // (slots, heads, key_dim, value_dim), updated
  void* norm;                   // (slots, heads, key_dim), updated; with stabilizer
  const int64_t* slots;         // [batch] or nullptr: where the state of each row lies; below 0 the row is left out
};

}  // namespace lcore
