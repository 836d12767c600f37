// A paged KV cache's tensors as kernels see them; attention_paged, cache_append_ and cache_compact_ check them here.
#pragma once

#include "torch/library.h"

namespace lcore {

// pool (num_pages, page_bytes) uint8; page_table (batch, kv_heads, width) and kv_lengths (batch, kv_heads) int32; tails
// (batch, kv_heads, page_size, dim); all contiguous. `added` tokens come on top of kv_lengths, one number a sequence,
// or none when it is empty: every page up to there must be in the table and the pool, which is checked where the host
// can read them. plain_pages and parts as in core/kv_pages.h.
KvPages kv_pages(const char* op, const Tensor& pool, const Tensor& page_table, const Tensor& kv_lengths,
                 const Tensor& tail_k, const Tensor& tail_v, const std::string& k_format, const std::string& v_format,
                 int64_t page_size, int64_t plain_pages, int64_t parts, const std::vector<int64_t>& added);

// [batch] numbers in [0, most], checked where the host can read them, or nullptr when there is no tensor.
const int64_t* row_counts(const char* op, const std::optional<Tensor>& lengths, int64_t batch, int64_t most);

}  // namespace lcore
