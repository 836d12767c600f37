// What the append to a paged KV cache is told.
#pragma once

#include "core/attention.h"

namespace lcore {

struct CacheAppendParams {
  DType type;        // of k, v and the tails
  KvPages pages;     // the table names the pages that fill up
  uint8_t* pool;     // pages.pool, to write
  int32_t* lengths;  // pages.lengths, to write: they grow by the tokens appended
  void* tail_k;      // pages.tail_k, to write
  void* tail_v;
  Strided k;  // (batch, new, kv_heads, head_dim)
  Strided v;  // (batch, new, kv_heads, head_dim_v)
  int64_t batch;
  int64_t new_tokens;
  int64_t kv_heads;
  int head_dim;
  int head_dim_v;
  const int64_t* counts;  // [batch] real tokens of right-padded rows, or nullptr
};

}  // namespace lcore
