// lcore::attention, its backward, and attention over a paged cache, on CPU tensors.
#include <algorithm>

#include "cpu/kernels.h"
#include "torch/attention_params.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;
// Output and LSE of q's shape. Tokens behind the last packed sequence, and padding rows, belong to no sequence: they
// keep (0, -inf), the neutral element.
std::tuple<Tensor, Tensor> new_results(const Tensor& q, AttentionParams& p, bool has_loose_rows) {
  const std::vector<int64_t> out_shape = q.dim() == 3 ? std::vector<int64_t>{p.seq_q, p.heads, p.head_dim_v}
                                                      : std::vector<int64_t>{q.size(0), p.seq_q, p.heads, p.head_dim_v};
  const std::vector<int64_t> lse_shape =
      q.dim() == 3 ? std::vector<int64_t>{p.heads, p.seq_q} : std::vector<int64_t>{q.size(0), p.heads, p.seq_q};
  Tensor out = new_tensor(q, out_shape);
  Tensor lse = new_tensor(q, lse_shape, lse_type(q));
  if (has_loose_rows) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  p.out = out.data_ptr();
  p.lse = lse.data_ptr();
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, bool causal, std::vector<int64_t> window_size,
                                     std::optional<double> softmax_scale, double softcap, OptionalTensor alibi_slopes,
                                     OptionalTensor sinks, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                     std::optional<int64_t>, std::optional<int64_t>) {
  AttentionParams p = dense_params("attention", q, k, &v, causal, window_size, softmax_scale, softcap, alibi_slopes,
                                   sinks, cu_seqlens_q, cu_seqlens_k);
  auto results = new_results(q, p, cu_seqlens_q.has_value());
  TorchExecutor executor;
  cpu::kernels().attention_forward(p, executor);
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,
    std::vector<int64_t> window_size, std::optional<double> softmax_scale, double softcap, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
  const char* op = "attention_backward";
  AttentionGradParams p{};
  p.forward = dense_params(op, q, k, &v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, cu_seqlens_q,
                           cu_seqlens_k);
  const auto same_shape = [&](const Tensor& a, const Tensor& b) {
    return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
  };
  require(out.is_contiguous() && lse.is_contiguous() && lse.scalar_type() == lse_type(q) &&
              lse.numel() == out.numel() / std::max(p.forward.head_dim_v, 1),
          op, "out and lse must be what attention returned");
  require(same_shape(dout, out) && dout.scalar_type() == q.scalar_type(), op, "dout must have out's shape and dtype");
  require(!dlse.has_value() || (same_shape(*dlse, lse) && dlse->is_contiguous() && dlse->scalar_type() == lse_type(q)),
          op, "dlse must be contiguous with lse's shape and dtype");
  p.forward.out = out.data_ptr();
  p.forward.lse = lse.data_ptr();
  p.dout = strided(dout);
  p.dlse = dlse.has_value() ? dlse->data_ptr() : nullptr;
  const auto gradient = [&](const Tensor& x) {
    Tensor grad = new_tensor(x, {x.sizes().begin(), x.sizes().end()});
    if (cu_seqlens_q.has_value()) torch::stable::zero_(grad);
    return grad;
  };
  Tensor dq = gradient(q), dk = gradient(k), dv = gradient(v);
  Tensor dsinks = new_tensor(q, {sinks.has_value() ? p.forward.heads : 0}, lse_type(q));
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  p.dsinks = sinks.has_value() ? dsinks.data_ptr() : nullptr;
  TorchExecutor executor;
  cpu::kernels().attention_backward(p, executor);
  return {dq, dk, dv, dsinks};
}

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
      "attention(Tensor q, Tensor k, Tensor v, bool causal=False, int[] window_size=[-1, -1], float? "
      "softmax_scale=None,"
      " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? cu_seqlens_q=None,"
      " Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,"
      " int[] window_size, float? softmax_scale, float softcap, Tensor? alibi_slopes, Tensor? sinks,"
      " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def(
      "attention_paged(Tensor q, Tensor pool, Tensor page_table, Tensor kv_lengths, Tensor tail_k, Tensor tail_v,"
      " str k_format, str v_format, int page_size, Tensor? lengths, int[] window_size, float softmax_scale,"
      " float softcap, Tensor? alibi_slopes, Tensor? sinks, int plain_pages=0, int parts=1, Tensor? inv_freq=None,"
      " float attention_scaling=1.0, bool interleaved=False, Tensor? places=None) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("attention", LCORE_BOX(lcore::attention));
  m.impl("attention_backward", LCORE_BOX(lcore::attention_backward));
  m.impl("attention_paged", LCORE_BOX(lcore::attention_paged));
}
