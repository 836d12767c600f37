// lcore::cache_append_, and the checks of a paged cache's tensors.
#include "torch/cache.h"

#include <algorithm>
#include <limits>

#include "core/cache_append.h"
#include "torch/device.h"

namespace lcore {

using torch::headeronly::ScalarType;

namespace {

void set_plain_pages(const char* op, KvPages& pages, int64_t plain_pages, int64_t parts, const Tensor& tail_k,
                     const Tensor& tail_v) {
  require(parts > 0 && pages.page_size % parts == 0 && plain_pages >= 0 && (parts == 1 || !pages.plain()), op,
          "parts must divide page_size and plain_pages not be negative, got " + std::to_string(parts) + " and " +
              std::to_string(plain_pages));
  pages.plain_pages = pages.plain() ? 0 : std::min(plain_pages, kAllPages);
  pages.parts = parts;
  if (pages.plain_pages == 0) return;
  const PageFormat format = plain_format(dtype_of(tail_k));
  pages.plain_v_offset = page_side(format, false, pages.page_size / parts, tail_k.size(3)).bytes;
  const int64_t bytes = pages.plain_v_offset + page_side(format, true, pages.page_size / parts, tail_v.size(3)).bytes;
  require(bytes <= pages.page_bytes, op,
          "a part of a plain page takes " + std::to_string(bytes) + " bytes, pages of the pool have " +
              std::to_string(pages.page_bytes));
  if (pages.plain_pages == kAllPages) pages.k_format = pages.v_format = format;
}

}  // namespace

KvPages kv_pages(const char* op, const Tensor& pool, const Tensor& page_table, const Tensor& kv_lengths,
                 const Tensor& tail_k, const Tensor& tail_v, const std::string& k_format, const std::string& v_format,
                 int64_t page_size, int64_t plain_pages, int64_t parts, const std::vector<int64_t>& added) {
  for (const Tensor* t : {&pool, &page_table, &kv_lengths, &tail_k, &tail_v}) {
    require(t->is_contiguous(), op, "the cache's tensors must be contiguous");
  }
  require(pool.dim() == 2 && page_table.dim() == 3 && kv_lengths.dim() == 2 && tail_k.dim() == 4 && tail_v.dim() == 4,
          op, "pool, page_table, kv_lengths, tail_k and tail_v must have 2, 3, 2, 4 and 4 dimensions");
  require(pool.scalar_type() == ScalarType::Byte && page_table.scalar_type() == ScalarType::Int &&
              kv_lengths.scalar_type() == ScalarType::Int && tail_v.scalar_type() == tail_k.scalar_type(),
          op, "pool must be uint8, page_table and kv_lengths int32, the tails of one dtype");
  const int64_t batch = tail_k.size(0), kv_heads = tail_k.size(1);
  for (const Tensor* t : {&page_table, &kv_lengths, &tail_v}) {
    require(t->size(0) == batch && t->size(1) == kv_heads, op,
            "page_table, kv_lengths and the tails must begin with (batch, kv_heads), got " + shape_text(*t));
  }
  require(page_size > 0 && tail_k.size(2) == page_size && tail_v.size(2) == page_size, op,
          "the tails must hold page_size = " + std::to_string(page_size) + " tokens, got " + shape_text(tail_k));

  KvPages pages{};
  pages.k_format = format_of(k_format);
  pages.v_format = format_of(v_format);
  pages.pool = static_cast<const uint8_t*>(pool.data_ptr());
  pages.page_bytes = pool.size(1);
  pages.page_size = page_size;
  pages.v_offset = page_side(pages.k_format, false, page_size, tail_k.size(3)).bytes;
  const int64_t wanted = pages.v_offset + page_side(pages.v_format, true, page_size, tail_v.size(3)).bytes;
  const bool codable = page_size >= 16 && page_size <= 256 && (page_size & (page_size - 1)) == 0;
  require(pages.plain() || codable, op,
          "page_size must be a power of two in 16 .. 256 for coded pages, got " + std::to_string(page_size));
  require(
      pages.plain() || (tail_k.scalar_type() != ScalarType::Double && tail_k.size(3) <= 512 && tail_v.size(3) <= 512),
      op, "coded pages must have tails of float32, float16 or bfloat16 and a head_dim of at most 512");
  require(pages.page_bytes == wanted, op,
          "pool must have pages of " + std::to_string(wanted) + " bytes, got " + std::to_string(pages.page_bytes));
  set_plain_pages(op, pages, plain_pages, parts, tail_k, tail_v);
  pages.page_table = static_cast<const int32_t*>(page_table.data_ptr());
  pages.table_width = page_table.size(2);
  pages.lengths = static_cast<const int32_t*>(kv_lengths.data_ptr());
  pages.tail_k = tail_k.data_ptr();
  pages.tail_v = tail_v.data_ptr();
  for (int64_t slot = 0; !on_gpu(pool) && slot < batch * kv_heads; ++slot) {
    const int64_t length = pages.lengths[slot] + (added.empty() ? 0 : added[slot / kv_heads]);
    require(pages.lengths[slot] >= 0 && length <= std::numeric_limits<int32_t>::max() &&
                pages.column(length / page_size) <= pages.table_width,
            op, "kv_lengths must fit int32 and page_table, got " + std::to_string(length));
    for (int64_t i = 0; i < pages.column(length / page_size); ++i) {
      const int32_t id = pages.page_table[slot * pages.table_width + i];
      require(id >= 0 && id < pool.size(0), op, "page_table must hold ids of the pool, got " + std::to_string(id));
    }
  }
  return pages;
}

const int64_t* row_counts(const char* op, const std::optional<Tensor>& lengths, int64_t batch, int64_t most) {
  if (!lengths.has_value()) return nullptr;
  require(lengths->is_contiguous() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
              lengths->size(0) == batch,
          op, "lengths must be contiguous int64 of shape (batch,)");
  const auto* counts = static_cast<const int64_t*>(lengths->data_ptr());
  for (int64_t b = 0; !on_gpu(*lengths) && b < batch; ++b) {
    require(counts[b] >= 0 && counts[b] <= most, op,
            "lengths must lie in [0, " + std::to_string(most) + "], got " + std::to_string(counts[b]));
  }
  return counts;
}

namespace {

bool is_cached_type(const Tensor& t) {
  const auto type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

void cache_append(Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v, Tensor k, Tensor v,
                  std::string k_format, std::string v_format, int64_t page_size, std::optional<Tensor> lengths,
                  int64_t plain_pages, int64_t parts) {
  const char* op = "cache_append_";
  require(k.dim() == 4 && v.dim() == 4 && tail_k.dim() == 4 && tail_v.dim() == 4, op,
          "k, v and the tails must have 4 dimensions");
  require(is_cached_type(k) && k.scalar_type() == tail_k.scalar_type() && v.scalar_type() == k.scalar_type(), op,
          "k and v must have the tails' dtype, float32, float64, float16 or bfloat16");
  require(k.size(0) == tail_k.size(0) && k.size(2) == tail_k.size(1) && k.size(3) == tail_k.size(3), op,
          "k must have shape (batch, new, kv_heads, head_dim), got " + shape_text(k));
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2) && v.size(3) == tail_v.size(3), op,
          "v must have shape (batch, new, kv_heads, head_dim_v), got " + shape_text(v));
  CacheAppendParams p{};
  p.type = dtype_of(k);
  p.batch = k.size(0);
  p.new_tokens = k.size(1);
  p.kv_heads = k.size(2);
  p.head_dim = static_cast<int>(k.size(3));
  p.head_dim_v = static_cast<int>(v.size(3));
  p.counts = row_counts(op, lengths, p.batch, p.new_tokens);
  std::vector<int64_t> added(p.batch, p.new_tokens);
  if (p.counts != nullptr && !on_gpu(k)) added.assign(p.counts, p.counts + p.batch);
  p.pages = kv_pages(op, pool, page_table, kv_lengths, tail_k, tail_v, k_format, v_format, page_size, plain_pages,
                     parts, added);
  p.pool = static_cast<uint8_t*>(pool.data_ptr());
  p.lengths = static_cast<int32_t*>(kv_lengths.data_ptr());
  p.tail_k = tail_k.data_ptr();
  p.tail_v = tail_v.data_ptr();
  p.k = strided(k);
  p.v = strided(v);
  LCORE_RUN(cache_append, k, p)
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "cache_append_(Tensor(a!) pool, Tensor page_table, Tensor(b!) kv_lengths, Tensor(c!) tail_k, Tensor(d!) tail_v,"
      " Tensor k, Tensor v, str k_format, str v_format, int page_size, Tensor? lengths, int plain_pages=0,"
      " int parts=1) -> ()");
}

LCORE_KERNELS(m) { m.impl<lcore::cache_append>("cache_append_"); }
