// What the compaction of a paged KV cache is told.
#pragma once

#include "core/kv_pages.h"

namespace lcore {

// new_table names a page for each full page of kept tokens: the slot's page of that index, or one that no slot reads.
struct CacheCompactParams {
  DType type;           // of the tails
  KvPages pages;        // what is there now
  uint8_t* pool;        // pages.pool, to write
  int32_t* page_table;  // pages.page_table, to write: new_table's entries
  int32_t* lengths;     // pages.lengths, to write: the tokens kept
  void* tail_k;         // pages.tail_k, to write
  void* tail_v;
  const int32_t* new_table;  // (batch, kv_heads, new_width)
  int64_t new_width;
  const int32_t* keep;     // [offsets[slots]] tokens that stay, rising within a slot
  const int64_t* offsets;  // [slots + 1]
  int64_t slots;           // batch * kv_heads
  int head_dim;
  int head_dim_v;
};

}  // namespace lcore
