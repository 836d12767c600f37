// lcore::page_bounds, lcore::page_bounds_paged and lcore::page_scores on CPU tensors.
#include "core/page_bounds.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "torch/cache.h"
#include "torch/rope.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

bool is_plain_float(const Tensor& t) {
  const auto type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

Tensor run_bounds(const char* op, PageBoundsParams p, const Tensor& like, const std::string& dtype) {
  require(dtype == "float32" || dtype == "bfloat16", op, "dtype must be float32 or bfloat16, got " + dtype);
  require(p.first >= 0 && p.first <= p.last && p.last <= kUnbounded / std::max<int64_t>(p.page_size, 1), op,
          "pages must be a range from 0 on, got [" + std::to_string(p.first) + ", " + std::to_string(p.last) + ")");
  const bool wide = dtype == "float32";
  Tensor bounds = new_tensor(like, {p.keys.batch, p.keys.kv_heads, p.last - p.first, 2, p.keys.head_dim},
                             wide ? ScalarType::Float : ScalarType::BFloat16);
  p.type = wide ? DType::kFloat32 : DType::kBFloat16;
  p.bounds = bounds.data_ptr();
  TorchExecutor executor;
  cpu::kernels().page_bounds(p, executor);
  return bounds;
}

Tensor page_bounds(Tensor k, int64_t page_size, std::string dtype) {
  const char* op = "page_bounds";
  require(k.is_cpu() && k.dim() == 4 && is_plain_float(k), op,
          "k must have 4 dimensions, on the CPU, float32, float16 or bfloat16");
  require(page_size > 0 && page_size <= std::numeric_limits<int>::max(), op,
          "page_size must be positive, got " + std::to_string(page_size));
  PageBoundsParams p{};
  p.keys.type = dtype_of(k);
  p.keys.k = strided(k);
  p.keys.batch = k.size(0);
  p.keys.seq_k = k.size(1);
  p.keys.heads = p.keys.kv_heads = k.size(2);
  p.keys.head_dim = static_cast<int>(k.size(3));
  p.page_size = page_size;
  p.last = p.keys.seq_k / page_size;
  return run_bounds(op, p, k, dtype);
}

Tensor page_bounds_paged(Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,
                         std::string k_format, std::string v_format, int64_t page_size, int64_t first, int64_t last,
                         std::string dtype, int64_t plain_pages, int64_t parts, OptionalTensor inv_freq,
                         double attention_scaling, bool interleaved) {
  const char* op = "page_bounds_paged";
  require(tail_k.dim() == 4 && tail_v.dim() == 4, op, "the tails must have 4 dimensions");
  KvPages pages =
      kv_pages(op, pool, page_table, kv_lengths, tail_k, tail_v, k_format, v_format, page_size, plain_pages, parts, {});
  if (inv_freq.has_value()) {
    require(is_plain_float(tail_k), op, "tail_k must not be float64 with inv_freq");
    pages.rope = rotation_of(op, *inv_freq, attention_scaling, interleaved, tail_k.size(3));
  }
  PageBoundsParams p{};
  p.keys.type = dtype_of(tail_k);
  p.keys.pages = &pages;
  p.keys.batch = tail_k.size(0);
  p.keys.heads = p.keys.kv_heads = tail_k.size(1);
  p.keys.head_dim = static_cast<int>(tail_k.size(3));
  p.keys.head_dim_v = static_cast<int>(tail_v.size(3));
  p.page_size = page_size;
  p.first = first;
  p.last = last;
  return run_bounds(op, p, tail_k, dtype);
}

Tensor page_scores(Tensor q, Tensor bounds, std::optional<Tensor> page_counts, std::optional<Tensor> lengths,
                   std::optional<double> softmax_scale, bool per_head) {
  const char* op = "page_scores";
  require(q.is_cpu() && bounds.is_cpu() && q.dim() == 4 && bounds.dim() == 5, op,
          "q and bounds must be on the CPU with 4 and 5 dimensions");
  require(is_plain_float(q), op, "q must have dtype float32, float16 or bfloat16");
  require(bounds.scalar_type() == ScalarType::Float || bounds.scalar_type() == ScalarType::BFloat16, op,
          "bounds must have dtype float32 or bfloat16");
  PageScoresParams p{};
  p.type = dtype_of(q);
  p.q = strided(q);
  p.batch = q.size(0);
  p.seq_q = q.size(1);
  p.heads = q.size(2);
  p.head_dim = static_cast<int>(q.size(3));
  p.kv_heads = bounds.size(1);
  p.pages = bounds.size(2);
  require(p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, "heads must be a multiple of kv_heads");
  require(bounds.size(0) == p.batch && bounds.size(3) == 2 && bounds.size(4) == p.head_dim, op,
          "bounds must have shape (batch, kv_heads, pages, 2, head_dim), got " + shape_text(bounds));
  const auto strides = bounds.strides();
  require(strides[4] == 1 && strides[3] == p.head_dim, op, "a page's bounds must be contiguous");
  p.bounds_type = dtype_of(bounds);
  p.bounds = {bounds.data_ptr(), strides[0], strides[2], strides[1], 1};
  if (page_counts.has_value()) {
    require(page_counts->is_cpu() && page_counts->is_contiguous() && page_counts->scalar_type() == ScalarType::Int &&
                page_counts->dim() == 2 && page_counts->size(0) == p.batch && page_counts->size(1) == p.kv_heads,
            op, "page_counts must be contiguous int32 of shape (batch, kv_heads)");
    p.page_counts = static_cast<const int32_t*>(page_counts->data_ptr());
  }
  p.q_lengths = row_counts(op, lengths, p.batch, p.seq_q);
  p.per_head = per_head;
  p.softmax_scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max(p.head_dim, 1))));
  Tensor scores = new_tensor(q, {p.batch, per_head ? p.heads : p.kv_heads, p.pages}, ScalarType::Float);
  p.scores = static_cast<float*>(scores.data_ptr());
  TorchExecutor executor;
  cpu::kernels().page_scores(p, executor);
  return scores;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def("page_bounds(Tensor k, int page_size, str dtype=\"bfloat16\") -> Tensor");
  m.def(
      "page_bounds_paged(Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,"
      " str k_format, str v_format, int page_size, int first, int last, str dtype, int plain_pages=0,"
      " int parts=1, Tensor? inv_freq=None, float attention_scaling=1.0, bool interleaved=False) -> Tensor");
  m.def(
      "page_scores(Tensor q, Tensor bounds, Tensor? page_counts=None, Tensor? lengths=None, float? softmax_scale=None,"
      " bool per_head=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("page_bounds", LCORE_BOX(lcore::page_bounds));
  m.impl("page_bounds_paged", LCORE_BOX(lcore::page_bounds_paged));
  m.impl("page_scores", LCORE_BOX(lcore::page_scores));
}
