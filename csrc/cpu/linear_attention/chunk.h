// The tiles of one chunk, as forward and backward read them. State and values lie in packed panels (gemm.h): each is
// the B of a product and the C of another.
#pragma once

#include "cpu/linear_attention/channel_pairs.h"
#include "cpu/linear_attention/pairs.h"
#include "cpu/linear_attention/rank_one.h"
#include "cpu/linear_attention/solve.h"

namespace lcore::cpu::LCORE_ISA {

template <class T, bool kChannel>
struct Chunk {
  using M = Widened<T>;
  const LinearAttentionParams& p;
  int columns;  // of the state
  int ld;       // key_dim and columns, padded to vectors
  int ld_v;
  Decay<T, kChannel> decay;
  PairScratch<T> pairs;
  T* q;           // [tokens][ld]: q times scale
  T* q_in;        // q decayed from the state before the chunk
  T* k;           // [tokens][ld]
  T* minus_k_in;  // -k decayed from the state before the chunk; with beta
  T* k_out;       // k decayed to the state behind the chunk
  T* scores;      // [tokens][kChunk]: of q and k
  T* overlap;     // of k and k; with beta
  T* minus;       // -beta_i overlap_ij, i > j; with beta
  T* values;  // panels [tokens][ld_v]: what is written to the state: v, or with beta what v adds to what k finds there
  T* residual;  // panels: v minus what k finds in the state; with beta
  T* beta;      // [tokens]
  T* weight;    // [tokens]
  T* bonus;     // [ld]: the head's; with bonus
  T* total;     // [ld]: decay of the chunk
  RankOne<T> one;
  int n = 0;

  Chunk(const LinearAttentionParams& params, int value_columns, Arena& arena)
      : p(params),
        columns(state_columns(p, value_columns)),
        ld(round_up_lanes<T>(p.key_dim)),
        ld_v(round_up_lanes<T>(columns)),
        decay(ld, arena) {
    pairs = take_pair_scratch<T, kChannel>(ld, arena);
    for (T** tile : {&q, &q_in, &k, &k_out}) *tile = arena.take<T>(kChunk * ld);
    scores = arena.take<T>(kChunk * kChunk);
    values = arena.take<T>(kChunk * ld_v);
    total = arena.take<T>(ld);
    weight = arena.take<T>(kChunk);
    bonus = arena.take<T>(ld);
    if (has_rank_one()) one.take(ld, ld_v, arena);
    if (!has_beta()) return;
    minus_k_in = arena.take<T>(kChunk * ld);
    overlap = arena.take<T>(kChunk * kChunk);
    minus = arena.take<T>(kChunk * kChunk);
    residual = arena.take<T>(kChunk * ld_v);
    beta = arena.take<T>(kChunk);
  }

  bool has_beta() const { return p.beta.data != nullptr; }
  bool has_rank_one() const { return kChannel && p.a.data != nullptr; }
  // Queries meet the state of this many tokens before: with bonus that before their own token. Row i then has the
  // decays of row i - 1, and its own key stands apart.
  int late() const { return p.bonus != nullptr ? 1 : 0; }

  // Decay and keys of a chunk.
  void load_keys(const LinearItem& item, int64_t index) {
    n = item.tokens(index);
    const int64_t token = index * kChunk;
    decay.load_tokens(p, item, token, n);
    decay.total(n, total);
    prepare_pairs(decay, n, pairs);
    const RowsIn keys = rows_at(p.k, p.type, item, qk_head(p, item), token);
    load_tensor(keys, n, p.key_dim, k, ld);
    prefetch_next_chunk(keys, p.key_dim);
    decay.apply(decay.suffix, k, n, k_out);
    if constexpr (kChannel) {
      if (has_rank_one()) one.load_keys(p, item, token, n, decay, pairs, k);
    }
    if (!has_beta()) return;
    load_tensor(rows_at(p.beta, p.beta_type, item, item.head, token), n, 1, beta, 1);
    decay.apply(decay.prefix, k, n, minus_k_in);
    for (int i = 0; i < n * ld; i += kLanes<T>) store(minus_k_in + i, -load(minus_k_in + i));
    pair_scores(decay, k, k, n, p.key_dim, pairs, overlap);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < kChunk; ++j) minus[i * kChunk + j] = j < i ? -beta[i] * overlap[i * kChunk + j] : T{0};
    }
  }

  // Values of a chunk, given the keys and the state before it.
  void load_values(const LinearItem& item, int64_t index, const T* state) {
    const int64_t token = index * kChunk;
    const RowsIn rows = rows_at(p.v, p.type, item, item.head, token, item.column);
    pack_tensor(rows, n, item.columns, values, ld_v);
    prefetch_next_chunk(rows, item.columns);
    if (p.weight.data != nullptr) {
      load_tensor(rows_at(p.weight, p.weight_type, item, item.head, token), n, 1, weight, 1);
      scale_rows(values, n, ld_v, weight);
    }
    if (p.stabilizer != nullptr) set_column(weight, values, n, ld_v, item.columns);
    if (has_rank_one()) one.find(state, values, p.key_dim, n, ld, ld_v);
    if (!has_beta()) return;
    gemm_to_panels<M, Accumulate::kAdd>({minus_k_in, ld, 1}, state, p.key_dim, values, n, n, ld_v);
    std::copy(values, values + n * ld_v, residual);
    scale_rows(values, n, ld_v, beta);
    solve_lower(minus, n, values, ld_v);
  }

  // Queries of a chunk, given its keys.
  void load_queries(const LinearItem& item, int64_t index) {
    const RowsIn queries = rows_at(p.q, p.type, item, qk_head(p, item), index * kChunk);
    load_tensor(queries, n, p.key_dim, q, ld);
    prefetch_next_chunk(queries, p.key_dim);
    const T scale = static_cast<T>(p.scale);
    for (int i = 0; i < n * ld; i += kLanes<T>) store(q + i, load(q + i) * scale);
    const int first = late();
    std::copy(q, q + first * ld, q_in);
    decay.apply(decay.prefix, q + first * ld, n - first, q_in + first * ld);
    std::fill(scores, scores + first * kChunk, T{0});
    pair_scores(decay, q + first * ld, k, n - first, p.key_dim, pairs, scores + first * kChunk);
    if (p.bonus != nullptr) {
      const T* row = static_cast<const T*>(p.bonus) + item.head * p.key_dim;
      std::fill(std::copy(row, row + p.key_dim, bonus), bonus + ld, T{0});
      set_diagonal(q, k, bonus, ld, n, scores);
    }
    if constexpr (kChannel) {
      if (has_rank_one()) pair_scores(decay, q, one.b, n, p.key_dim, pairs, one.scores);
    }
  }

  // What queries read, [n][ld_v], given the state before the chunk.
  void read(const T* state, T* out) const {
    gemm<M, Accumulate::kOverwrite>({q_in, ld, 1}, state, p.key_dim, {0, p.key_dim}, out, ld_v, n, ld_v);
    const auto add = [&](T* weights, T* written) {
      gemm_masked<M, Accumulate::kAdd>({weights, kChunk, 1}, written, n, all_finite(written, n * ld_v), out, ld_v, n,
                                       ld_v, [](int r, int count) { return Steps{0, r + count}; });
    };
    add(scores, values);
    if (has_rank_one()) add(one.scores, one.found);
  }

  // The state behind the chunk, in place of that before it.
  void advance(T* state) const {
    gemm_to_panels<M, Accumulate::kScaleAndAdd>({k_out, 1, ld}, values, n, state, p.key_dim, p.key_dim, ld_v, total);
    if (!has_rank_one()) return;
    gemm_to_panels<M, Accumulate::kAdd>({one.b_out, 1, ld}, one.found, n, state, p.key_dim, p.key_dim, ld_v);
  }
};

}  // namespace lcore::cpu::LCORE_ISA
