// What tokens i >= j of a chunk are to each other: s_ij = sum_c x_ic y_jc e^(g_(j+1)c + ... + g_ic), and its gradients.
// With one decay a token it is a factor of the whole sum: one matrix product, times a table of decays. With a decay for
// each channel (channel_pairs.h) it is not.
#pragma once

#include "cpu/linear_attention/decay.h"

namespace lcore::cpu::LCORE_ISA {

// Matrices of pairs have rows of kChunk, zero above the diagonal.
template <class T>
struct PairScratch {
  T* panels;   // operands of products
  T* decays;   // [kChunk][kChunk]: a_(j+1) ... a_i, without channels
  T* entered;  // [kSubChunk][ld], the others [kChunk][ld]: with channels
  T* carried;
  T* dx;
  T* dy;
  T* running;  // [ld]
};

inline constexpr int kSubChunk = 16;

template <class T, bool kChannel>
PairScratch<T> take_pair_scratch(int ld, Arena& arena) {
  PairScratch<T> s{};
  s.panels = arena.take<T>(kChunk * ld);
  if constexpr (kChannel) {
    s.entered = arena.take<T>(kSubChunk * ld);
    s.carried = arena.take<T>(kChunk * ld);
    s.dx = arena.take<T>(kChunk * ld);
    s.dy = arena.take<T>(kChunk * ld);
    s.running = arena.take<T>(ld);
  } else {
    s.decays = arena.take<T>(kChunk * kChunk);
  }
  return s;
}

// Pairs of a token with itself, which no decay touches, with a factor for each channel.
template <class T>
void set_diagonal(const T* x, const T* y, const T* factors, int ld, int n, T* pairs) {
  for (int t = 0; t < n; ++t) {
    Vec<T> sum{};
    for (int c = 0; c < ld; c += kLanes<T>) sum += load(x + t * ld + c) * load(factors + c) * load(y + t * ld + c);
    pairs[t * kChunk + t] = reduce_add<T>(sum);
  }
}

// Zeroes what stands behind column i of row i.
template <class T>
void keep_lower(T* pairs, int n) {
  for (int i = 0; i < n; ++i) std::fill(pairs + i * kChunk + i + 1, pairs + (i + 1) * kChunk, T{0});
}

// c_ij = a_i . b_j for i >= j, b in packed columns over `depth` steps.
template <class T>
void multiply_lower(const T* a, int64_t ld, const T* columns, int depth, int n, T* c) {
  const int cols = round_up_lanes<T>(n);
  for (int j = 0; j < cols; j += kPanel<T>) {
    gemm<Widened<T>, Accumulate::kOverwrite>({a + j * ld, ld, 1}, columns + int64_t{j} * depth, depth, {0, depth},
                                             c + j * kChunk + j, kChunk, n - j, std::min(kPanel<T>, cols - j));
  }
  keep_lower(c, n);
}

// What depends on the decays alone.
template <class T>
void prepare_pairs(const Decay<T, false>& decay, int n, const PairScratch<T>& s) {
  for (int i = 0; i < n; ++i) {
    T* row = s.decays + i * kChunk;
    const T* above = row - kChunk;
    for (int j = 0; j < i; ++j) row[j] = above[j] * decay.step[i];
    row[i] = T{1};
  }
  keep_lower(s.decays, n);
}

template <class T>
void multiply_by_decays(int n, const PairScratch<T>& s, T* pairs) {
  for (int i = 0; i < n; ++i) {
    T* row = pairs + i * kChunk;
    for (int c = 0; c <= i; c += kLanes<T>) store(row + c, load(row + c) * load(s.decays + i * kChunk + c));
  }
}

template <class T>
void pair_scores(const Decay<T, false>& decay, const T* x, const T* y, int n, int key_dim, const PairScratch<T>& s,
                 T* scores) {
  pack_transposed(y, decay.ld, n, key_dim, s.panels);
  multiply_lower(x, decay.ld, s.panels, key_dim, n, scores);
  multiply_by_decays(n, s, scores);
}

// Adds to dx, dy [n][ld] and dg [n] what the gradient of the scores gives them, and spoils dscores.
template <class T>
void pair_gradients(const Decay<T, false>& decay, const T* x, const T* y, const T* scores, int n,
                    const PairScratch<T>& s, T* dscores, T* dx, T* dy, T* dg) {
  using M = Widened<T>;
  // A pair feels the decay of every token t with j < t <= i: sums over i from t on, then over j. No differences.
  T below[kChunk] = {};
  for (int t = n - 1; t > 0; --t) {
    T sum{0};
    for (int j = 0; j < t; ++j) {
      below[j] += dscores[t * kChunk + j] * scores[t * kChunk + j];
      sum += below[j];
    }
    dg[t] += sum;
  }
  multiply_by_decays(n, s, dscores);
  const int cols = decay.ld;
  pack_tile(y, cols, n, s.panels);
  gemm_masked<M, Accumulate::kAdd>({dscores, kChunk, 1}, s.panels, n, all_finite(s.panels, n * cols), dx, decay.ld, n,
                                   cols, [](int r, int count) { return Steps{0, r + count}; });
  pack_tile(x, cols, n, s.panels);
  gemm_masked<M, Accumulate::kAdd>({dscores, 1, kChunk}, s.panels, n, all_finite(s.panels, n * cols), dy, decay.ld, n,
                                   cols, [n](int r, int) { return Steps{r, n}; });
}

}  // namespace lcore::cpu::LCORE_ISA
