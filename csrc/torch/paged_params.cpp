// The arguments of ops on a paged cache, on the CPU.
#include <algorithm>

#include "torch/attention_params.h"
#include "torch/cache.h"
#include "torch/rope.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

void set_places(const char* op, const Tensor& places, int64_t batch, int64_t kv_heads, KvPages& pages) {
  require(places.is_cpu() && places.is_contiguous() && places.scalar_type() == ScalarType::Int && places.dim() == 3 &&
              places.size(0) == batch && places.size(1) == kv_heads,
          op, "places must be contiguous int32 of shape (batch, kv_heads, pages + 1), got " + shape_text(places));
  require(pages.page_size % 16 == 0, op,
          "page_size must be a multiple of 16 with places, got " + std::to_string(pages.page_size));
  pages.places = static_cast<const int32_t*>(places.data_ptr());
  pages.places_width = places.size(2);
  for (int64_t slot = 0; slot < batch * kv_heads; ++slot) {
    const int64_t full = pages.lengths[slot] / pages.page_size;
    require(full < pages.places_width, op, "places must have an entry for every full page and one for the tail");
    const int32_t* own = pages.places + slot * pages.places_width;
    require(std::all_of(own, own + full + 1, [](int32_t place) { return place >= 0; }), op, "places must be >= 0");
  }
}

}  // namespace

AttentionParams paged_params(const char* op, const Tensor& q, const CacheArguments& cache,
                             const OptionalTensor& lengths, const std::vector<int64_t>& window_size,
                             double softmax_scale, double softcap, const OptionalTensor& alibi_slopes,
                             const OptionalTensor& sinks, KvPages& pages) {
  const Tensor &tail_k = cache.tail_k, &tail_v = cache.tail_v;
  require(q.is_cpu() && q.dim() == 4 && tail_k.dim() == 4 && tail_v.dim() == 4, op,
          "q and the tails must have 4 dimensions, q on the CPU");
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
  if (cache.places.has_value()) set_places(op, *cache.places, p.batch, p.kv_heads, pages);
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
