// lcore::attention, its backward, and attention over a paged cache, on CPU tensors.
#include <algorithm>

#include "cpu/kernels.h"
#include "torch/cache.h"
#include "torch/library.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

int64_t window(int64_t side) { return side < 0 ? kUnbounded : std::min(side, kUnbounded); }

ScalarType lse_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const void* head_data(const char* op, const char* name, const OptionalTensor& t, ScalarType type, int64_t heads) {
  if (!t.has_value()) return nullptr;
  require(t->is_cpu() && t->is_contiguous() && t->scalar_type() == type && t->dim() >= 1 && t->dim() <= 2 &&
              t->size(t->dim() - 1) == heads,
          op,
          std::string(name) + " must be contiguous " + torch::headeronly::toString(type) +
              " on the CPU with last size " + std::to_string(heads));
  return t->data_ptr();
}

// The arguments that have one number a head; p knows its batch and heads.
void set_head_data(const char* op, AttentionParams& p, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                   ScalarType sinks_type) {
  p.alibi_slopes = static_cast<const float*>(head_data(op, "alibi_slopes", alibi_slopes, ScalarType::Float, p.heads));
  p.alibi_batch = alibi_slopes.has_value() && alibi_slopes->dim() == 2 ? p.heads : 0;
  require(p.alibi_batch == 0 || alibi_slopes->size(0) == p.batch, op, "alibi_slopes must have one row a sequence");
  p.sinks = head_data(op, "sinks", sinks, sinks_type, p.heads);
}

// Offsets of packed sequences: int32, from 0, never falling, not past the tensor.
const int32_t* offsets(const char* op, const char* name, const Tensor& cu, int64_t sequences, int64_t tokens) {
  require(cu.is_cpu() && cu.is_contiguous() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 &&
              cu.size(0) == sequences + 1,
          op, std::string(name) + " must be contiguous int32 of shape (" + std::to_string(sequences + 1) + ",)");
  const auto* values = static_cast<const int32_t*>(cu.data_ptr());
  bool valid = values[0] == 0 && values[sequences] <= tokens;
  for (int64_t i = 0; i < sequences; ++i) valid = valid && values[i] <= values[i + 1];
  require(valid, op, std::string(name) + " must rise from 0 to at most " + std::to_string(tokens) + " tokens");
  return values;
}

struct Mask {
  int64_t left, right;
};

Mask mask_of(const char* op, bool causal, const std::vector<int64_t>& window_size) {
  require(window_size.size() == 2, op, "window_size must have two entries");
  return {window(window_size[0]), causal ? 0 : window(window_size[1])};
}

// Everything that the forward and the backward read from their common arguments. The tensors must outlive the result.
AttentionParams params_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                          const std::vector<int64_t>& window_size, std::optional<double> softmax_scale, double softcap,
                          const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  const bool packed = cu_seqlens_q.has_value();
  const int64_t rank = packed ? 3 : 4;
  require(packed == cu_seqlens_k.has_value(), op, "cu_seqlens_q and cu_seqlens_k must be given together");
  require(q.is_cpu() && k.is_cpu() && v.is_cpu(), op, "q, k and v must be on the CPU");
  require(q.dim() == rank && k.dim() == rank && v.dim() == rank, op,
          "q, k and v must have " + std::to_string(rank) + " dimensions");
  require(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), op,
          "q, k and v must have one dtype");
  const int64_t heads = q.size(rank - 2), kv_heads = k.size(rank - 2);
  require(kv_heads > 0 && heads % kv_heads == 0, op, "heads must be a multiple of kv_heads");
  require(v.size(rank - 2) == kv_heads && v.size(rank - 3) == k.size(rank - 3), op,
          "v must have k's tokens and heads, got " + shape_text(v) + " and " + shape_text(k));
  require(k.size(rank - 1) == q.size(rank - 1), op, "q and k must have one head_dim");
  require(packed || (k.size(0) == q.size(0) && v.size(0) == q.size(0)), op, "q, k and v must have one batch size");

  AttentionParams p{};
  p.type = dtype_of(q);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = static_cast<int>(q.size(rank - 1));
  p.head_dim_v = static_cast<int>(v.size(rank - 1));
  p.seq_q = q.size(rank - 3);
  p.seq_k = k.size(rank - 3);
  p.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  if (packed) {
    p.cu_seqlens_q = offsets(op, "cu_seqlens_q", *cu_seqlens_q, p.batch, p.seq_q);
    p.cu_seqlens_k = offsets(op, "cu_seqlens_k", *cu_seqlens_k, p.batch, p.seq_k);
  }
  p.lse_head = p.seq_q;
  p.lse_batch = packed ? 0 : heads * p.seq_q;
  const Mask mask = mask_of(op, causal, window_size);
  p.window_left = mask.left;
  p.window_right = mask.right;
  p.softmax_scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max(p.head_dim, 1))));
  p.softcap = softcap;
  set_head_data(op, p, alibi_slopes, sinks, lse_type(q));
  return p;
}

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
  AttentionParams p = params_of("attention", q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks,
                                cu_seqlens_q, cu_seqlens_k);
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
  p.forward = params_of(op, q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, cu_seqlens_q,
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
                                           OptionalTensor sinks) {
  const char* op = "attention_paged";
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
  const KvPages pages = kv_pages(op, pool, page_table, kv_lengths, tail_k, tail_v, k_format, v_format, page_size, {});
  p.pages = &pages;
  p.q_lengths = row_counts(op, lengths, p.batch, p.seq_q);
  p.lse_head = p.seq_q;
  p.lse_batch = p.heads * p.seq_q;
  const Mask mask = mask_of(op, true, window_size);
  p.window_left = mask.left;
  p.window_right = mask.right;
  p.softmax_scale = softmax_scale;
  p.softcap = softcap;
  set_head_data(op, p, alibi_slopes, sinks, lse_type(q));
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
      " float softcap, Tensor? alibi_slopes, Tensor? sinks) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(lcore, CPU, m) {
  m.impl("attention", LCORE_BOX(lcore::attention));
  m.impl("attention_backward", LCORE_BOX(lcore::attention_backward));
  m.impl("attention_paged", LCORE_BOX(lcore::attention_paged));
}
