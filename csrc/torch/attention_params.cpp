#include "torch/attention_params.h"

#include <algorithm>
#include <cmath>

#include "torch/device.h"

namespace lcore {

using torch::headeronly::ScalarType;

namespace {

int64_t window(int64_t side) { return side < 0 ? kUnbounded : std::min(side, kUnbounded); }

const void* head_data(const char* op, const char* name, const OptionalTensor& t, ScalarType type, int64_t heads) {
  if (!t.has_value()) return nullptr;
  require(t->is_contiguous() && t->scalar_type() == type && t->dim() >= 1 && t->dim() <= 2 &&
              t->size(t->dim() - 1) == heads,
          op,
          std::string(name) + " must be contiguous " + torch::headeronly::toString(type) + " with last size " +
              std::to_string(heads));
  return t->data_ptr();
}

// Offsets of packed sequences: int32, from 0, never falling, not past the tensor.
const int32_t* offsets(const char* op, const char* name, const Tensor& cu, int64_t sequences, int64_t tokens) {
  require(cu.is_contiguous() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) == sequences + 1, op,
          std::string(name) + " must be contiguous int32 of shape (" + std::to_string(sequences + 1) + ",)");
  const auto* values = static_cast<const int32_t*>(cu.data_ptr());
  if (on_gpu(cu)) return values;
  bool valid = values[0] == 0 && values[sequences] <= tokens;
  for (int64_t i = 0; i < sequences; ++i) valid = valid && values[i] <= values[i + 1];
  require(valid, op, std::string(name) + " must rise from 0 to at most " + std::to_string(tokens) + " tokens");
  return values;
}

}  // namespace

void set_mask(const char* op, AttentionParams& p, bool causal, const std::vector<int64_t>& window_size) {
  require(window_size.size() == 2, op, "window_size must have two entries");
  p.window_left = window(window_size[0]);
  p.window_right = causal ? 0 : window(window_size[1]);
}

void set_head_data(const char* op, AttentionParams& p, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                   ScalarType sinks_type) {
  p.alibi_slopes = static_cast<const float*>(head_data(op, "alibi_slopes", alibi_slopes, ScalarType::Float, p.heads));
  p.alibi_batch = alibi_slopes.has_value() && alibi_slopes->dim() == 2 ? p.heads : 0;
  require(p.alibi_batch == 0 || alibi_slopes->size(0) == p.batch, op, "alibi_slopes must have one row a sequence");
  p.sinks = head_data(op, "sinks", sinks, sinks_type, p.heads);
}

ScalarType lse_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

AttentionParams dense_params(const char* op, const Tensor& q, const Tensor& k, const Tensor* v, bool causal,
                             const std::vector<int64_t>& window_size, std::optional<double> softmax_scale,
                             double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  const std::string names = v == nullptr ? "q and k" : "q, k and v";
  const Tensor& values = v == nullptr ? k : *v;
  const bool packed = cu_seqlens_q.has_value();
  const int64_t rank = packed ? 3 : 4;
  require(packed == cu_seqlens_k.has_value(), op, "cu_seqlens_q and cu_seqlens_k must be given together");
  require(q.dim() == rank && k.dim() == rank && values.dim() == rank, op,
          names + " must have " + std::to_string(rank) + " dimensions");
  require(q.scalar_type() == k.scalar_type() && q.scalar_type() == values.scalar_type(), op,
          names + " must have one dtype");
  const int64_t heads = q.size(rank - 2), kv_heads = k.size(rank - 2);
  require(kv_heads > 0 && heads % kv_heads == 0, op, "heads must be a multiple of kv_heads");
  require(values.size(rank - 2) == kv_heads && values.size(rank - 3) == k.size(rank - 3), op,
          "v must have k's tokens and heads, got " + shape_text(values) + " and " + shape_text(k));
  require(k.size(rank - 1) == q.size(rank - 1), op, "q and k must have one head_dim");
  require(packed || (k.size(0) == q.size(0) && values.size(0) == q.size(0)), op, names + " must have one batch size");

  AttentionParams p{};
  p.type = dtype_of(q);
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(values);
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = static_cast<int>(q.size(rank - 1));
  p.head_dim_v = static_cast<int>(values.size(rank - 1));
  p.seq_q = q.size(rank - 3);
  p.seq_k = k.size(rank - 3);
  p.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  if (packed) {
    p.cu_seqlens_q = offsets(op, "cu_seqlens_q", *cu_seqlens_q, p.batch, p.seq_q);
    p.cu_seqlens_k = offsets(op, "cu_seqlens_k", *cu_seqlens_k, p.batch, p.seq_k);
  }
  p.lse_head = p.seq_q;
  p.lse_batch = packed ? 0 : heads * p.seq_q;
  set_mask(op, p, causal, window_size);
  p.softmax_scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max(p.head_dim, 1))));
  p.softcap = softcap;
  set_head_data(op, p, alibi_slopes, sinks, lse_type(q));
  return p;
}

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

}  // namespace lcore
