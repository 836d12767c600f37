// What the gradients of a chunk are computed in, and the steps that several of them share.
#pragma once

#include "cpu/linear_attention/chunk.h"
#include "cpu/linear_attention/output.h"

namespace lcore::cpu::LCORE_ISA {

inline constexpr int64_t kSegment = 64;  // chunks whose states are kept at once

template <class T, bool kChannel>
struct GradientTiles {
  using M = Widened<T>;
  Chunk<T, kChannel> chunk;
  Output<T> output;
  int64_t state_size;
  T* segments;     // [segments]: state before the first chunk of each
  T* states;       // [kSegment]: state before each chunk of one segment, in panels
  T* state;        // panels [key_dim][ld_v], on the way right
  T* dstate;       // panels: gradient of the state behind the chunk
  T* rows_s;       // [key_dim][ld_v]: a state or its gradient, in rows
  T* transposed;   // panels [columns][ld]: its transpose
  T* dout;         // [tokens][ld_v]
  T* dout_panels;  // panels [tokens][ld_v]
  T* dvalues;      // the same
  T* rows_v;       // [tokens][ld_v]
  T* values_t;     // panels [columns][tokens]
  T* dscores;      // [tokens][kChunk]
  T* dq;           // [tokens][ld]
  T* dk;
  T* through;  // [tokens][ld]: what comes through the state
  T* dg;       // [tokens][ld], or [tokens]
  T* dbeta;    // [tokens]
  T* dbonus;   // [ld]
  T* dskip;    // [ld_v]
  T* row;      // [max(ld, ld_v)]
  T* da;       // [tokens][ld], as the next; with a
  T* db;
  T* dfound;   // panels [tokens][ld_v]
  T* found_t;  // panels [columns][tokens]

  GradientTiles(const LinearAttentionParams& p, int64_t longest, Arena& arena)
      : chunk(p, p.value_dim, arena), output(p, chunk.ld_v, arena) {
    const int ld = chunk.ld, ld_v = chunk.ld_v;
    const int64_t chunks = (longest + kChunk - 1) / kChunk;
    state_size = int64_t{p.key_dim} * ld_v;
    segments = arena.take<T>((chunks + kSegment - 1) / kSegment * state_size);
    states = arena.take<T>(std::min(chunks, kSegment) * state_size);
    for (T** tile : {&state, &dstate, &rows_s}) *tile = arena.take<T>(state_size);
    transposed = arena.take<T>(int64_t{chunk.columns} * ld);
    for (T** tile : {&dout, &dout_panels, &dvalues, &rows_v, &values_t}) *tile = arena.take<T>(kChunk * ld_v);
    dscores = arena.take<T>(kChunk * kChunk);
    for (T** tile : {&dq, &dk, &through}) *tile = arena.take<T>(kChunk * ld);
    dg = arena.take<T>(kChannel ? kChunk * ld : kChunk);
    dbeta = arena.take<T>(kChunk);
    dbonus = arena.take<T>(ld);
    dskip = arena.take<T>(ld_v);
    row = arena.take<T>(std::max(ld, ld_v));
    if (!chunk.has_rank_one()) return;
    for (T** tile : {&da, &db}) *tile = arena.take<T>(kChunk * ld);
    for (T** tile : {&dfound, &found_t}) *tile = arena.take<T>(kChunk * ld_v);
  }

  // Gradient of what is written under keys, in panels: d = scores^T G + K_out dS.
  void written(const T* scores, const T* keys_out, T* d) {
    const int n = chunk.n, ld_v = chunk.ld_v, key_dim = chunk.p.key_dim;
    gemm_to_panels<M, Accumulate::kOverwrite>({keys_out, chunk.ld, 1}, dstate, key_dim, d, n, n, ld_v);
    gemm_masked_to_panels<M>({scores, 1, kChunk}, dout_panels, n, d, ld_v, [n](int r, int) { return Steps{r, n}; });
  }

  // Panels over the tokens as rows, in rows_v.
  void unpack(T* panels) {
    for (int t = 0; t < chunk.n; ++t) row_from_panels(panels, chunk.n, chunk.ld_v, t, rows_v + t * chunk.ld_v);
  }

  // to = rows_v state^T.
  void through_state(T* state, const T* rows_v, T* to) {
    const int ld = chunk.ld, ld_v = chunk.ld_v;
    for (int d = 0; d < chunk.p.key_dim; ++d) {
      row_from_panels(state, chunk.p.key_dim, ld_v, d, rows_s + int64_t{d} * ld_v);
    }
    pack_transposed(rows_s, ld_v, chunk.p.key_dim, chunk.columns, transposed);
    gemm<M, Accumulate::kOverwrite>({rows_v, ld_v, 1}, transposed, chunk.columns, {0, chunk.columns}, to, ld, chunk.n,
                                    ld);
  }

  void add_to_dg(int t, const Vec<T>& sum, int c) {
    if constexpr (kChannel) {
      store(dg + t * chunk.ld + c, load(dg + t * chunk.ld + c) + sum);
    } else {
      dg[t] += reduce_add<T>(sum);
    }
  }

  // dg_t += sum of x_i dx_i over i >= t: what comes from the state before the chunk passes every token up to i.
  void add_entering(const T* x, const T* dx, int n) {
    const int ld = chunk.ld;
    for (int c = 0; c < ld; c += kLanes<T>) {
      Vec<T> sum{};
      for (int t = n - 1; t >= 0; --t) {
        sum += load(x + t * ld + c) * load(dx + t * ld + c);
        add_to_dg(t, sum, c);
      }
    }
  }

  // dg_t += sum of k_j dk_j over j < t: what goes to the state behind the chunk passes every token after j. And the
  // state, whose gradient lies in rows_s, passes all.
  void add_leaving(const T* k, const T* dk, T* state) {
    const int ld = chunk.ld, ld_v = chunk.ld_v;
    std::fill(through, through + ld, T{0});
    for (int d = 0; state != nullptr && d < chunk.p.key_dim; ++d) {
      row_from_panels(state, chunk.p.key_dim, ld_v, d, row);
      Vec<T> sum{};
      for (int c = 0; c < ld_v; c += kLanes<T>) sum += load(row + c) * load(rows_s + int64_t{d} * ld_v + c);
      through[d] = chunk.total[d] * reduce_add<T>(sum);
    }
    for (int c = 0; c < ld; c += kLanes<T>) {
      Vec<T> sum = load(through + c);
      for (int t = 0; t < chunk.n; ++t) {
        add_to_dg(t, sum, c);
        sum += load(k + t * ld + c) * load(dk + t * ld + c);
      }
    }
  }
};

}  // namespace lcore::cpu::LCORE_ISA
