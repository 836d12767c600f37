// lcore::key_mass and lcore::key_mass_paged on CPU tensors.
#include "core/key_mass.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "torch/attention_params.h"

namespace lcore {
namespace {

// Runs the kernel on what `attention` says; the result is lse's dtype and `shape`, whose last size may be longer than
// the keys of some sequences, or leave keys behind the last one: these have mass 0.
Tensor run(const char* op, const AttentionParams& attention, const Tensor& q, const Tensor& lse,
           const std::string& reduction, const std::vector<int64_t>& shape, bool loose) {
  const std::vector<int64_t> wanted = q.dim() == 3
                                          ? std::vector<int64_t>{attention.heads, attention.seq_q}
                                          : std::vector<int64_t>{attention.batch, attention.heads, attention.seq_q};
  require(lse.is_cpu() && lse.is_contiguous() && lse.scalar_type() == lse_type(q) &&
              std::equal(lse.sizes().begin(), lse.sizes().end(), wanted.begin(), wanted.end()),
          op, "lse must be what attention returned for q, contiguous, got shape " + shape_text(lse));
  require(reduction == "sum" || reduction == "max", op, "reduction must be sum or max, got " + reduction);
  Tensor mass = new_tensor(q, shape, lse_type(q));
  if (loose) torch::stable::zero_(mass);
  KeyMassParams p{attention, mass.data_ptr(), 0, shape.back(), reduction == "max"};
  p.attention.lse = lse.data_ptr();
  p.mass_batch = q.dim() == 3 ? 0 : attention.kv_heads * shape.back();
  TorchExecutor executor;
  cpu::kernels().key_mass(p, executor);
  return mass;
}

Tensor key_mass(Tensor q, Tensor k, Tensor lse, bool causal, std::vector<int64_t> window_size,
                std::optional<double> softmax_scale, double softcap, OptionalTensor alibi_slopes,
                OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, std::string reduction) {
  const char* op = "key_mass";
  const AttentionParams p = dense_params(op, q, k, nullptr, causal, window_size, softmax_scale, softcap, alibi_slopes,
                                         {}, cu_seqlens_q, cu_seqlens_k);
  const std::vector<int64_t> shape =
      q.dim() == 3 ? std::vector<int64_t>{p.kv_heads, p.seq_k} : std::vector<int64_t>{p.batch, p.kv_heads, p.seq_k};
  return run(op, p, q, lse, reduction, shape, cu_seqlens_q.has_value());
}

Tensor key_mass_paged(Tensor q, Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,
                      std::string k_format, std::string v_format, int64_t page_size, OptionalTensor lengths,
                      std::vector<int64_t> window_size, double softmax_scale, double softcap,
                      OptionalTensor alibi_slopes, Tensor lse, std::string reduction, int64_t width,
                      int64_t plain_pages, int64_t parts, OptionalTensor inv_freq, double attention_scaling,
                      bool interleaved) {
  const char* op = "key_mass_paged";
  const CacheArguments cache{pool,     page_table,        kv_lengths, tail_k,      tail_v,
                             k_format, v_format,          page_size,  plain_pages, parts,
                             inv_freq, attention_scaling, interleaved};
  KvPages pages;
  const AttentionParams p =
      paged_params(op, q, cache, lengths, window_size, softmax_scale, softcap, alibi_slopes, {}, pages);
  const int32_t longest = p.batch == 0 ? 0 : *std::max_element(pages.lengths, pages.lengths + p.batch * p.kv_heads);
  require(
      width >= longest, op,
      "width must be at least the longest head's " + std::to_string(longest) + " tokens, got " + std::to_string(width));
  return run(op, p, q, lse, reduction, {p.batch, p.kv_heads, width}, true);
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def(
      "key_mass(Tensor q, Tensor k, Tensor lse, bool causal=False, int[] window_size=[-1, -1], float? "
      "softmax_scale=None, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? cu_seqlens_q=None,"
      " Tensor? cu_seqlens_k=None, str reduction=\"sum\") -> Tensor");
  m.def(
      "key_mass_paged(Tensor q, Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,"
      " str k_format, str v_format, int page_size, Tensor? lengths, int[] window_size, float softmax_scale,"
      " float softcap, Tensor? alibi_slopes, Tensor lse, str reduction, int width, int plain_pages=0, int parts=1,"
      " Tensor? inv_freq=None, float attention_scaling=1.0, bool interleaved=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("key_mass", LCORE_BOX(lcore::key_mass));
  m.impl("key_mass_paged", LCORE_BOX(lcore::key_mass_paged));
}
