// lcore::attention and its backward.
#include <algorithm>

#include "torch/attention_params.h"
#include "torch/device.h"

namespace lcore {
namespace {

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, bool causal, std::vector<int64_t> window_size,
                                     std::optional<double> softmax_scale, double softcap, OptionalTensor alibi_slopes,
                                     OptionalTensor sinks, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                     std::optional<int64_t>, std::optional<int64_t>) {
  AttentionParams p = dense_params("attention", q, k, &v, causal, window_size, softmax_scale, softcap, alibi_slopes,
                                   sinks, cu_seqlens_q, cu_seqlens_k);
  auto results = new_results(q, p, cu_seqlens_q.has_value());
  LCORE_RUN(attention_forward, q, p)
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
  LCORE_RUN(attention_backward, q, p)
  return {dq, dk, dv, dsinks};
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, bool causal=False, int[] window_size=[-1, -1], float? "
      "softmax_scale=None,"
      " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? cu_seqlens_q=None,"
      " Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,"
      " int[] window_size, float? softmax_scale, float softcap, Tensor? alibi_slopes, Tensor? sinks,"
      " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
}

LCORE_KERNELS(m) {
  m.impl<lcore::attention>("attention");
  m.impl<lcore::attention_backward>("attention_backward");
}
