// What a token moves from key to key (RWKV-7; diagonal plus low rank, Peng et al. 2025): with u_t = a_t^T S_(t-1)
//   S_t = diag(e^g_t) S_(t-1) + k_t v_t^T + b_t u_t^T.
// In a chunk U = A_in S + lower(A K^T) V + lower(A B^T) U, decays between, diagonals excluded: the delta rule's system
// (solve.h) with keys of its own to read and to write. a meets the state before its token, so row i of A has the decays
// of row i - 1.
#pragma once

#include "cpu/linear_attention/channel_pairs.h"
#include "cpu/linear_attention/solve.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
struct RankOne {
  using M = Widened<T>;
  T* a = nullptr;  // [tokens][ld]
  T* a_in;         // a decayed from the state before the chunk
  T* b;            // [tokens][ld]
  T* b_out;        // b decayed to the state behind the chunk
  T* given;        // [tokens][kChunk]: of a and k, i > j
  T* minus;        // of a and b, i > j: minus the L of (I + L) U
  T* scores;       // of q and b
  T* found;        // panels [tokens][ld_v]: U

  void take(int ld, int ld_v, Arena& arena) {
    for (T** tile : {&a, &a_in, &b, &b_out}) *tile = arena.take<T>(kChunk * ld);
    for (T** pairs : {&given, &minus, &scores}) *pairs = arena.take<T>(kChunk * kChunk);
    found = arena.take<T>(kChunk * ld_v);
  }

  void load_keys(const LinearAttentionParams& p, const LinearItem& item, int64_t token, int n,
                 const Decay<T, true>& decay, const PairScratch<T>& s, const T* k) {
    const int ld = decay.ld;
    load_tensor(rows_at(p.a, p.type, item, item.head, token), n, p.key_dim, a, ld);
    load_tensor(rows_at(p.b, p.type, item, item.head, token), n, p.key_dim, b, ld);
    std::copy(a, a + ld, a_in);
    decay.apply(decay.prefix, a + ld, n - 1, a_in + ld);
    decay.apply(decay.suffix, b, n, b_out);
    std::fill(given, given + kChunk, T{0});
    pair_scores(decay, a + ld, k, n - 1, p.key_dim, s, given + kChunk);
    std::fill(minus, minus + kChunk, T{0});
    pair_scores(decay, a + ld, b, n - 1, p.key_dim, s, minus + kChunk);
  }

  // U from the state before the chunk and the values.
  void find(const T* state, T* values, int key_dim, int n, int ld, int ld_v) {
    gemm_to_panels<M, Accumulate::kOverwrite>({a_in, ld, 1}, state, key_dim, found, n, n, ld_v);
    gemm_masked_to_panels<M>({given, kChunk, 1}, values, n, found, ld_v,
                             [](int r, int count) { return Steps{0, r + count - 1}; });
    solve_lower(minus, n, found, ld_v);
  }
};

}  // namespace lcore::cpu::LCORE_ISA
