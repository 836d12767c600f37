// How a paged KV cache lies in memory. A page holds `page_size` tokens of one kv head: K, then V, each as
// core/page_format.h says. Tokens beyond the last full page wait in the tail, in the model's type. The first
// `plain_pages` pages of every head hold values of that type whatever the formats are: such a page is cut into `parts`
// pages of the pool, whose bytes are those of the formats.
#pragma once

#include <cstdint>

#include "core/page_format.h"
#include "core/rotation.h"

namespace lcore {

inline constexpr int64_t kAllPages = (int64_t{1} << 31) - 1;  // more than any head has

struct KvPages {
  const uint8_t* pool;  // [num_pages][page_bytes]
  int64_t page_bytes;
  int64_t v_offset;  // bytes from the page's start to V
  int64_t page_size;
  PageFormat k_format;
  PageFormat v_format;
  int64_t plain_pages = 0;     // kAllPages: every page, and the formats are plain
  int64_t parts = 1;           // of a plain page: page_size / parts tokens each
  int64_t plain_v_offset = 0;  // as v_offset, in a part

  // (batch, kv_heads, table_width): ids into pool, page by page, of plain pages all parts; entries past the length are
  // not read.
  const int32_t* page_table;
  int64_t table_width;
  const int32_t* lengths;  // (batch, kv_heads): tokens, those of the tail included
  const void* tail_k;      // (batch, kv_heads, page_size, head_dim)
  const void* tail_v;      // (batch, kv_heads, page_size, head_dim_v)

  // Of keys that are stored before RoPE, half 0 where they are stored after it: a key is read as rotated to its
  // position, and so is a query.
  Rotation rope;
  // (batch, kv_heads, places_width) or nullptr: which page of its text each page of a slot is, and the tail behind
  // them, where pages between them are left out; pages then hold a multiple of 16 tokens.
  const int32_t* places = nullptr;
  int64_t places_width = 0;

  PageFormat format(bool value) const { return value ? v_format : k_format; }
  // How many entries of the table stand before those of a page.
  int64_t column(int64_t page) const { return page + (page < plain_pages ? page : plain_pages) * (parts - 1); }
  bool before_rope() const { return rope.half > 0; }
  // Of key i of a slot: i, where nothing is left out.
  int64_t position(int64_t slot, int64_t key) const {
    if (places == nullptr) return key;
    return places[slot * places_width + key / page_size] * page_size + key % page_size;
  }
  bool plain() const { return is_plain(k_format) && is_plain(v_format); }
};

}  // namespace lcore
