// How a paged KV cache lies in memory. A page holds `page_size` tokens of one kv head: the K codes
// [page_size][head_dim], then, from the next multiple of 64 bytes, the V codes [page_size][head_dim_v]. Tokens beyond
// the last full page wait in the tail, in the model's type.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace lcore {

struct KvPages {
  const uint8_t* pool;  // [num_pages][page_bytes]
  int64_t page_bytes;
  int64_t v_offset;  // bytes from the page's start to its V codes
  int64_t page_size;
  DType k_type;
  DType v_type;

  const int32_t* page_table;  // (batch, kv_heads, table_width): ids into pool; entries past the length are not read
  int64_t table_width;
  const int32_t* lengths;  // (batch, kv_heads): tokens, those of the tail included
  const void* tail_k;      // (batch, kv_heads, page_size, head_dim)
  const void* tail_v;      // (batch, kv_heads, page_size, head_dim_v)
};

inline constexpr int64_t kPageAlignment = 64;  // a cache line, and the widest vector

constexpr int64_t page_v_offset(int64_t page_size, int64_t head_dim, DType k_type) {
  const int64_t bytes = page_size * head_dim * static_cast<int64_t>(size_of(k_type));
  return (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
}

constexpr int64_t page_bytes(int64_t page_size, int64_t head_dim, int64_t head_dim_v, DType k_type, DType v_type) {
  return page_v_offset(page_size, head_dim, k_type) + page_v_offset(page_size, head_dim_v, v_type);
}

}  // namespace lcore
