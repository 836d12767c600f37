// The tiles of one chunk, as forward and backward read them. State and values lie in packed panels (gemm.h): each is
// the B of a product and the C of another.
#pragma once

#include "cpu/linear_attention/channel_pairs.h"
#include "cpu/linear_attention/pairs.h"
#include "cpu/linear_attention/solve.h"

namespace lcore::cpu::LCORE_ISA {

template <class T, bool kChannel>
struct Chunk {
  using M = Widened<T>;
  const LinearAttentionParams& p;
  int ld;  // key_dim and value columns, padded to vectors
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
  int n = 0;

  Chunk(const LinearAttentionParams& params, int columns, Arena& arena)
      : p(params), ld(round_up_lanes<T>(p.key_dim)), ld_v(round_up_lanes<T>(columns)), decay(ld, arena) {
    pairs = take_pair_scratch<T, kChannel>(ld, arena);
    for (T** tile : {&q, &q_in, &k, &k_out}) *tile = arena.take<T>(kChunk * ld);
    scores = arena.take<T>(kChunk * kChunk);
    values = arena.take<T>(kChunk * ld_v);
    total = arena.take<T>(ld);
    weight = arena.take<T>(kChunk);
    bonus = arena.take<T>(ld);
    if (!has_beta()) return;
    minus_k_in = arena.take<T>(kChunk * ld);
    overlap = arena.take<T>(kChunk * kChunk);
    minus = arena.take<T>(kChunk * kChunk);
    residual = arena.take<T>(kChunk * ld_v);
    beta = arena.take<T>(kChunk);
  }

  bool has_beta() const { return p.beta.data != nullptr; }
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
    load_rows(keys, n, p.key_dim, k, ld);
    prefetch_next_chunk(keys, p.key_dim);
    decay.apply(decay.suffix, k, n, k_out);
    if (!has_beta()) return;
    load_rows(rows_at(p.beta, p.beta_type, item, item.head, token), n, 1, beta, 1);
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
    pack_rows<M>(rows, n, item.columns, values, n, ld_v);
    prefetch_next_chunk(rows, item.columns);
    if (p.weight.data != nullptr) {
      load_rows(rows_at(p.weight, p.weight_type, item, item.head, token), n, 1, weight, 1);
      scale_rows(values, weight);
    }
    if (!has_beta()) return;
    gemm_to_panels<M, Accumulate::kAdd>({minus_k_in, ld, 1}, state, p.key_dim, values, n, n, ld_v);
    std::copy(values, values + n * ld_v, residual);
    scale_rows(values, beta);
    solve_lower(minus, n, values, ld_v);
  }

  // Queries of a chunk, given its keys.
  void load_queries(const LinearItem& item, int64_t index) {
    const RowsIn queries = rows_at(p.q, p.type, item, qk_head(p, item), index * kChunk);
    load_rows(queries, n, p.key_dim, q, ld);
    prefetch_next_chunk(queries, p.key_dim);
    const T scale = static_cast<T>(p.scale);
    for (int i = 0; i < n * ld; i += kLanes<T>) store(q + i, load(q + i) * scale);
    const int first = late();
    std::copy(q, q + first * ld, q_in);
    decay.apply(decay.prefix, q + first * ld, n - first, q_in + first * ld);
    std::fill(scores, scores + first * kChunk, T{0});
    pair_scores(decay, q + first * ld, k, n - first, p.key_dim, pairs, scores + first * kChunk);
    if (p.bonus != nullptr) add_own_keys(item);
  }

  // Scores of queries and the keys of their own tokens, which decays do not touch.
  void add_own_keys(const LinearItem& item) {
    const T* row = static_cast<const T*>(p.bonus) + item.head * p.key_dim;
    std::fill(std::copy(row, row + p.key_dim, bonus), bonus + ld, T{0});
    for (int t = 0; t < n; ++t) {
      Vec<T> sum{};
      for (int c = 0; c < ld; c += kLanes<T>) sum += load(q + t * ld + c) * load(bonus + c) * load(k + t * ld + c);
      scores[t * kChunk + t] = reduce_add<T>(sum);
    }
  }

  // The state behind the chunk, in place of that before it.
  void advance(T* state) const {
    gemm_to_panels<M, Accumulate::kScaleAndAdd>({k_out, 1, ld}, values, n, state, p.key_dim, p.key_dim, ld_v, total);
  }

  // Row t of panels over the tokens times factors[t].
  void scale_rows(T* panels, const T* factors) const {
    for (int t = 0; t < n; ++t) {
      for_each_vector(panels, n, ld_v, t, [&](T* place, int) { store(place, load(place) * factors[t]); });
    }
  }
};

}  // namespace lcore::cpu::LCORE_ISA
