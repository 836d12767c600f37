// lcore::attention_paged: attention over a paged cache, on CPU tensors.
#include "cpu/kernels.h"
#include "torch/attention_params.h"

namespace lcore {
namespace {

std::tuple<Tensor, Tensor> attention_paged(Tensor q, Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k,
                                           Tensor tail_v, std::string k_format, std::string v_format, int64_t page_size,
                                           OptionalTensor lengths, std::vector<int64_t> window_size,
                                           double softmax_scale, double softcap, OptionalTensor alibi_slopes,
                                           OptionalTensor sinks, int64_t plain_pages, int64_t parts,
                                           OptionalTensor inv_freq, double attention_scaling, bool interleaved,
                                           OptionalTensor places) {
  const CacheArguments cache{pool,     page_table,        kv_lengths,  tail_k,      tail_v,
                             k_format, v_format,          page_size,   plain_pages, parts,
                             inv_freq, attention_scaling, interleaved, places};
  KvPages pages;
  AttentionParams p = paged_params("attention_paged", q, cache, lengths, window_size, softmax_scale, softcap,
                                   alibi_slopes, sinks, pages);
  auto results = new_results(q, p, lengths.has_value());
  TorchExecutor executor;
  cpu::kernels().attention_forward(p, executor);
  return results;
}

}  // namespace
}  // namespace lcore

STABLE_TORCH_LIBRARY_FRAGMENT(lcore, m) {
  m.def(
      "attention_paged(Tensor q, Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,"
      " str k_format, str v_format, int page_size, Tensor? lengths, int[] window_size, float softmax_scale,"
      " float softcap, Tensor? alibi_slopes, Tensor? sinks, int plain_pages=0, int parts=1, Tensor? inv_freq=None,"
      " float attention_scaling=1.0, bool interleaved=False, Tensor? places=None) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) { m.impl("attention_paged", LCORE_BOX(lcore::attention_paged)); }
