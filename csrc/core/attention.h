// What an attention kernel is told: pointers, sizes and element strides. No torch.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "core/kv_pages.h"

namespace lcore {

// (batch, seq, heads, dim) by strides in elements. A packed tensor (tokens, heads, dim) has batch stride 0.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0;
  int64_t seq = 0;
  int64_t head = 0;
  int64_t dim = 1;
};

// Far more than any sequence, and still safe to add to a position.
inline constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max() / 4;

struct AttentionParams {
  DType type;            // of q, k, v and out
  Strided q;             // (batch, seq_q, heads, head_dim)
  Strided k;             // (batch, seq_k, kv_heads, head_dim); unused when pages is set
  Strided v;             // (batch, seq_k, kv_heads, head_dim_v); unused when pages is set
  const KvPages* pages;  // the paged cache that holds k and v, or nullptr

  void* out;          // (batch, seq_q, heads, head_dim_v) contiguous, or (tokens, heads, head_dim_v)
  void* lse;          // (batch, heads, seq_q) or (heads, tokens); float, or double when type is float64
  int64_t lse_batch;  // elements between batches of lse (0 when packed) and between its heads
  int64_t lse_head;

  int64_t batch;  // sequences
  int64_t seq_q;  // rows a sequence; with cu_seqlens_q the total of tokens
  int64_t seq_k;
  int64_t heads;
  int64_t kv_heads;
  int head_dim;
  int head_dim_v;

  const int32_t* cu_seqlens_q;  // [batch + 1] or nullptr: offsets of the packed sequences
  const int32_t* cu_seqlens_k;  // [batch + 1] or nullptr
  const int64_t* q_lengths;     // [batch] or nullptr: real rows of a right-padded q

  // Query i of a sequence of lengths (n, m) stands at key position p = i + m - n and sees keys
  // p - window_left .. p + window_right; causal is window_right = 0.
  int64_t window_left;
  int64_t window_right;
  double softmax_scale;
  double softcap;             // 0: none; else score = softcap * tanh(score / softcap)
  const float* alibi_slopes;  // (heads) or (batch, heads), or nullptr: score -= slope * |p - key|
  int64_t alibi_batch;        // elements between batches of alibi_slopes
  const void* sinks;          // [heads] of lse's type, or nullptr: one more logit in the denominator
};

struct AttentionGradParams {
  AttentionParams forward;  // out and lse hold the forward's results
  Strided dout;             // (batch, seq_q, heads, head_dim_v)
  const void* dlse;         // as lse, contiguous, or nullptr
  void* dq;                 // contiguous, shaped as q, k, v
  void* dk;
  void* dv;
  void* dsinks;  // [heads] of lse's type, or nullptr
};

}  // namespace lcore
