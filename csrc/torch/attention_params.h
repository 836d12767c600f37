// The arguments that every op on attention's scores takes, checked and as kernels see them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/library.h"

namespace lcore {

// float64 for float64 inputs, else float32: of lse, of sinks, and of sums over weights.
torch::headeronly::ScalarType lse_type(const Tensor& q);

// Everything that an op reads from dense or packed q, k, (v,) and its common arguments. The tensors must outlive the
// result.
AttentionParams dense_params(const char* op, const Tensor& q, const Tensor& k, const Tensor* v, bool causal,
                             const std::vector<int64_t>& window_size, std::optional<double> softmax_scale,
                             double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                             const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k);

// p's window, and its arguments that have one number a head; p knows its batch and heads.
void set_mask(const char* op, AttentionParams& p, bool causal, const std::vector<int64_t>& window_size);
void set_head_data(const char* op, AttentionParams& p, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                   torch::headeronly::ScalarType sinks_type);

// Output and LSE of q's shape, of which p is told. Tokens behind the last packed sequence, and padding rows, belong to
// no sequence: they keep (0, -inf), the neutral element.
std::tuple<Tensor, Tensor> new_results(const Tensor& q, AttentionParams& p, bool has_loose_rows);

// A paged cache's tensors and how its pages are coded, as the schemas of the ops that read it have them. With inv_freq
// its keys are stored before RoPE.
struct CacheArguments {
  const Tensor &pool, &page_table, &kv_lengths, &tail_k, &tail_v;
  const std::string &k_format, &v_format;
  int64_t page_size;
  int64_t plain_pages;
  int64_t parts;
  const OptionalTensor& inv_freq;
  double attention_scaling;
  bool interleaved;
  OptionalTensor places = std::nullopt;  // int32 (batch, kv_heads, pages and one more): KvPages::places
};

// The same for the last tokens of a cache's sequences, always causal. The tensors and `pages`, which is written, must
// outlive the result.
AttentionParams paged_params(const char* op, const Tensor& q, const CacheArguments& cache,
                             const OptionalTensor& lengths, const std::vector<int64_t>& window_size,
                             double softmax_scale, double softcap, const OptionalTensor& alibi_slopes,
                             const OptionalTensor& sinks, KvPages& pages);

}  // namespace lcore
