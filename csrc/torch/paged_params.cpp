// The arguments of ops on a paged cache.
#include "torch/attention_params.h"
#include "torch/cache.h"
#include "torch/rope.h"

namespace lcore {

AttentionParams paged_params(const char* op, const Tensor& q, const CacheArguments& cache,
                             const OptionalTensor& lengths, const std::vector<int64_t>& window_size,
                             double softmax_scale, double softcap, const OptionalTensor& alibi_slopes,
                             const OptionalTensor& sinks, KvPages& pages) {
  const Tensor &tail_k = cache.tail_k, &tail_v = cache.tail_v;
  require(q.dim() == 4 && tail_k.dim() == 4 && tail_v.dim() == 4, op, "q and the tails must have 4 dimensions");
  AttentionParams p{};
  p.type = dtype_of(q);
  p.q = strided(q);
  p.batch = q.size(0);
  p.seq_q = q.size(1);
  p.heads = q.size(2);
  p.kv_heads = tail_k.size(1);
  p.head_dim = static_cast<int>(q.size(3));
  p.head_dim_v = static_cast<int>(tail_v.size(3));
  require(p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, "heads must be a multiple of kv_heads");
  require(tail_k.size(0) == p.batch && tail_k.size(3) == p.head_dim && tail_k.scalar_type() == q.scalar_type(), op,
          "tail_k must have q's batch, head_dim and dtype, got " + shape_text(tail_k));
  pages = kv_pages(op, cache.pool, cache.page_table, cache.kv_lengths, tail_k, tail_v, cache.k_format, cache.v_format,
                   cache.page_size, cache.plain_pages, cache.parts, {});
  if (cache.inv_freq.has_value()) {
    pages.rope = rotation_of(op, *cache.inv_freq, cache.attention_scaling, cache.interleaved, p.head_dim);
  }
  p.pages = &pages;
  p.q_lengths = row_counts(op, lengths, p.batch, p.seq_q);
  p.lse_head = p.seq_q;
  p.lse_batch = p.heads * p.seq_q;
  set_mask(op, p, true, window_size);
  p.softmax_scale = softmax_scale;
  p.softcap = softcap;
  set_head_data(op, p, alibi_slopes, sinks, lse_type(q));
  return p;
}

}  // namespace lcore
