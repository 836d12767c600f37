// lcore::cache_compact_.
#include "core/cache_compact.h"

#include "torch/cache.h"
#include "torch/device.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

// The tokens to keep of every slot: rising, and among those that the slot holds.
void check_keep(const char* op, const KvPages& pages, const Tensor& keep, const Tensor& offsets, int64_t slots) {
  for (const Tensor* t : {&keep, &offsets}) {
    require(t->is_contiguous() && t->dim() == 1, op, "keep and offsets must be contiguous vectors");
  }
  require(keep.scalar_type() == ScalarType::Int && offsets.scalar_type() == ScalarType::Long, op,
          "keep must be int32 and offsets int64");
  require(offsets.size(0) == slots + 1, op,
          "offsets must have batch * kv_heads + 1 entries, got " + shape_text(offsets));
  if (on_gpu(keep)) return;
  const auto* tokens = static_cast<const int32_t*>(keep.data_ptr());
  const auto* first = static_cast<const int64_t*>(offsets.data_ptr());
  require(first[0] == 0 && first[slots] == keep.size(0), op, "offsets must go from 0 to the number of tokens to keep");
  for (int64_t slot = 0; slot < slots; ++slot) {
    require(first[slot] <= first[slot + 1] && first[slot + 1] <= keep.size(0), op, "offsets must not fall");
    for (int64_t i = first[slot]; i < first[slot + 1]; ++i) {
      const int64_t least = i == first[slot] ? 0 : int64_t{tokens[i - 1]} + 1;
      require(tokens[i] >= least && tokens[i] < pages.lengths[slot], op,
              "keep must rise within a slot and name tokens that it holds, got " + std::to_string(tokens[i]));
    }
  }
}

// A page for each full page of kept tokens.
void check_new_table(const char* op, const CacheCompactParams& p, const Tensor& table, const Tensor& tails,
                     int64_t num_pages) {
  require(table.is_contiguous() && table.dim() == 3 && table.scalar_type() == ScalarType::Int &&
              table.size(0) == tails.size(0) && table.size(1) == tails.size(1),
          op, "new_table must be contiguous int32 of shape (batch, kv_heads, width)");
  for (int64_t slot = 0; !on_gpu(table) && slot < p.slots; ++slot) {
    const int64_t pages = (p.offsets[slot + 1] - p.offsets[slot]) / p.pages.page_size;
    require(pages <= p.new_width, op, "new_table must be wide enough for the tokens to keep");
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t id = p.new_table[slot * p.new_width + i];
      require(id >= 0 && id < num_pages, op, "new_table must hold ids of the pool, got " + std::to_string(id));
    }
  }
}

void cache_compact(Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v, Tensor new_table,
                   Tensor keep, Tensor offsets, std::string k_format, std::string v_format, int64_t page_size) {
  const char* op = "cache_compact_";
  CacheCompactParams p{};
  p.pages = kv_pages(op, pool, page_table, kv_lengths, tail_k, tail_v, k_format, v_format, page_size, 0, 1, {});
  require(p.pages.plain(), op, "pages must store values, fp32, fp16 or bf16: codes mean nothing outside of their page");
  const auto type = tail_k.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
          "the tails must be float32, float16 or bfloat16");
  p.type = dtype_of(tail_k);
  p.slots = tail_k.size(0) * tail_k.size(1);
  p.head_dim = static_cast<int>(tail_k.size(3));
  p.head_dim_v = static_cast<int>(tail_v.size(3));
  check_keep(op, p.pages, keep, offsets, p.slots);
  p.keep = static_cast<const int32_t*>(keep.data_ptr());
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  p.new_table = static_cast<const int32_t*>(new_table.data_ptr());
  p.new_width = new_table.dim() == 3 ? new_table.size(2) : 0;
  check_new_table(op, p, new_table, tail_k, pool.size(0));
  p.pool = static_cast<uint8_t*>(pool.data_ptr());
  p.page_table = static_cast<int32_t*>(page_table.data_ptr());
  p.lengths = static_cast<int32_t*>(kv_lengths.data_ptr());
  p.tail_k = tail_k.data_ptr();
  p.tail_v = tail_v.data_ptr();
  LCORE_RUN(cache_compact, pool, p)
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "cache_compact_(Tensor(a!) pool, Tensor(b!) page_table, Tensor(c!) kv_lengths, Tensor(d!) tail_k,"
      " Tensor(e!) tail_v, Tensor new_table, Tensor keep, Tensor offsets, str k_format, str v_format, int page_size)"
      " -> ()");
}

LCORE_KERNELS(m) { m.impl<lcore::cache_compact>("cache_compact_"); }
