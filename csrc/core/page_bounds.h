// What the bounds of pages of keys, and the scores of pages from them, are told.
#pragma once

#include "core/attention.h"

namespace lcore {

struct PageBoundsParams {
  AttentionParams keys;  // k or pages, batch, kv_heads, the dims; nothing else is read
  int64_t page_size;
  int64_t first;  // pages [first, last) of each head; those that are not full get zeros
  int64_t last;
  DType type;    // of bounds: float32, or bfloat16 rounded outward
  void* bounds;  // (batch, kv_heads, last - first, 2, head_dim): the least and the greatest of each channel
};

struct PageScoresParams {
  DType type;  // of q: float32, float16 or bfloat16
  Strided q;   // (batch, seq_q, heads, head_dim)
  DType bounds_type;
  Strided bounds;              // (batch, pages as seq, kv_heads, 2 * head_dim contiguous)
  const int32_t* page_counts;  // (batch, kv_heads) or nullptr: pages of each head; what comes behind scores -inf
  const int64_t* q_lengths;    // [batch] or nullptr: real rows of a right-padded q
  float* scores;               // (batch, kv_heads, pages), or with per_head (batch, heads, pages)
  bool per_head;
  int64_t batch;
  int64_t seq_q;
  int64_t pages;
  int64_t heads;
  int64_t kv_heads;
  int head_dim;
  double softmax_scale;
};

}  // namespace lcore
