// How a paged KV cache lies in memory. A page holds `page_size` tokens of one kv head: K, then V, each as
// core/page_format.h says. Tokens beyond the last full page wait in the tail, in the model's type.
#pragma once

#include <cstdint>

#include "core/page_format.h"
#include "core/rotation.h"

namespace lcore {

struct KvPages {
  const uint8_t* pool;  // [num_pages][page_bytes]
  int64_t page_bytes;
  int64_t v_offset;  // bytes from the page's start to V
  int64_t page_size;
  PageFormat k_format;
  PageFormat v_format;

  const int32_t* page_table;  // (batch, kv_heads, table_width): ids into pool; entries past the length are not read
  int64_t table_width;
  const int32_t* lengths;  // (batch, kv_heads): tokens, those of the tail included
  const void* tail_k;      // (batch, kv_heads, page_size, head_dim)
  const void* tail_v;      // (batch, kv_heads, page_size, head_dim_v)

  // Of keys that are stored before RoPE, half 0 where they are stored after it: key i of a slot that holds m tokens is
  // read as rotated to position i, and the last of the queries to m - 1.
  Rotation rope;

  PageFormat format(bool value) const { return value ? v_format : k_format; }
  bool before_rope() const { return rope.half > 0; }
  bool plain() const { return is_plain(k_format) && is_plain(v_format); }
};

}  // namespace lcore
