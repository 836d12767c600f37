// pairs.h with a decay for each key channel: s_ij = sum_c x_ic y_jc E_ijc (Yang et al. 2023, GLA, section 4.3). A block
// of 16 rows meets all keys before it in one matrix product: decays split at the block's first token into "from j to
// there", carried on from block to block, and "from there to i", so no factor exceeds 1 where g <= 0. Inside a block
// the decay runs along with j, token by token.
#pragma once

#include "cpu/linear_attention/pairs.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
void prepare_pairs(const Decay<T, true>&, int, const PairScratch<T>&) {}

// Rows [0, first) of `rows`, decayed to the end of the block before, are decayed to token `first`.
template <class T>
void carry_rows(const Decay<T, true>& decay, int first, const PairScratch<T>& s, T* rows) {
  const int ld = decay.ld;
  std::fill(s.running, s.running + ld, T{1});
  for (int j = first - 1; j >= 0; --j) {
    for (int c = 0; c < ld; c += kLanes<T>) {
      const Vec<T> run = load(s.running + c);
      store(rows + j * ld + c, load(rows + j * ld + c) * run);
      if (j >= first - kSubChunk) store(s.running + c, run * load(decay.step + j * ld + c));
    }
  }
}

// y = x times the decay from token `first` on, that of `first` included, for the rows of its block.
template <class T>
void enter_rows(const Decay<T, true>& decay, int first, int rows, const PairScratch<T>& s, const T* x, T* y) {
  const int ld = decay.ld;
  std::fill(s.running, s.running + ld, T{1});
  for (int i = 0; i < rows; ++i) {
    for (int c = 0; c < ld; c += kLanes<T>) {
      const Vec<T> run = load(s.running + c) * load(decay.step + (first + i) * ld + c);
      store(s.running + c, run);
      store(y + i * ld + c, load(x + i * ld + c) * run);
    }
  }
}

// s.carried: the keys before `first`, decayed to it. Blocks come in order.
template <class T>
void carry_keys(const Decay<T, true>& decay, const T* y, int first, const PairScratch<T>& s) {
  const int64_t begin = int64_t{first - kSubChunk} * decay.ld, end = int64_t{first} * decay.ld;
  std::copy(y + begin, y + end, s.carried + begin);
  carry_rows(decay, first, s, s.carried);
}

template <class T>
void pair_scores(const Decay<T, true>& decay, const T* x, const T* y, int n, int key_dim, const PairScratch<T>& s,
                 T* scores) {
  const int ld = decay.ld;
  for (int first = 0; first < n; first += kSubChunk) {
    const int rows = std::min(kSubChunk, n - first);
    if (first > 0) {
      carry_keys(decay, y, first, s);
      enter_rows(decay, first, rows, s, x + first * ld, s.entered);
      pack_transposed(s.carried, ld, first, key_dim, s.panels);
      gemm<Widened<T>, Accumulate::kOverwrite>({s.entered, ld, 1}, s.panels, key_dim, {0, key_dim},
                                               scores + first * kChunk, kChunk, rows, first);
    }
    for (int i = first; i < first + rows; ++i) {
      std::copy(x + i * ld, x + (i + 1) * ld, s.running);
      for (int j = i; j >= first; --j) {
        Vec<T> sum{};
        for (int c = 0; c < ld; c += kLanes<T>) {
          const Vec<T> decayed = load(s.running + c);
          sum += decayed * load(y + j * ld + c);
          store(s.running + c, decayed * load(decay.step + j * ld + c));
        }
        scores[i * kChunk + j] = reduce_add<T>(sum);
      }
    }
  }
  keep_lower(scores, n);
}

// Gradients of the pairs inside one block.
template <class T>
void add_block_gradients(const Decay<T, true>& decay, const T* x, const T* y, int first, int rows,
                         const PairScratch<T>& s, const T* dscores) {
  const int ld = decay.ld;
  for (int i = first + 1; i < first + rows; ++i) {
    std::fill(s.running, s.running + ld, T{1});
    for (int j = i - 1; j >= first; --j) {
      const T d = dscores[i * kChunk + j];
      for (int c = 0; c < ld; c += kLanes<T>) {
        const Vec<T> run = load(s.running + c) * load(decay.step + (j + 1) * ld + c);
        store(s.running + c, run);
        store(s.dx + i * ld + c, load(s.dx + i * ld + c) + d * run * load(y + j * ld + c));
        store(s.dy + j * ld + c, load(s.dy + j * ld + c) + d * run * load(x + i * ld + c));
      }
    }
  }
}

// Adds to dx, dy and dg [n][ld] what the gradient of the scores gives them.
template <class T>
void pair_gradients(const Decay<T, true>& decay, const T* x, const T* y, const T*, int n, const PairScratch<T>& s,
                    T* dscores, T* dx, T* dy, T* dg) {
  using M = Widened<T>;
  const int ld = decay.ld, last = (n - 1) / kSubChunk * kSubChunk;
  std::fill(s.dx, s.dx + n * ld, T{0});
  std::fill(s.dy, s.dy + n * ld, T{0});
  for (int first = kSubChunk; first < n; first += kSubChunk) {
    const int rows = std::min(kSubChunk, n - first);
    carry_keys(decay, y, first, s);
    pack_tile(s.carried, ld, first, s.panels);
    gemm<M, Accumulate::kOverwrite>({dscores + first * kChunk, kChunk, 1}, s.panels, first, {0, first},
                                    s.dx + first * ld, ld, rows, ld);
    enter_rows(decay, first, rows, s, s.dx + first * ld, s.dx + first * ld);
  }
  for (int first = last; first > 0; first -= kSubChunk) {
    const int rows = std::min(kSubChunk, n - first);
    enter_rows(decay, first, rows, s, x + first * ld, s.entered);
    pack_tile(s.entered, ld, rows, s.panels);
    gemm<M, Accumulate::kAdd>({dscores + first * kChunk, 1, kChunk}, s.panels, rows, {0, rows}, s.dy, ld, first, ld);
    carry_rows(decay, first, s, s.dy);
  }
  for (int first = 0; first < n; first += kSubChunk) {
    add_block_gradients(decay, x, y, first, std::min(kSubChunk, n - first), s, dscores);
  }
  // A pair feels the decay of every token t with j < t <= i; a token and itself feel none.
  std::fill(s.running, s.running + ld, T{0});
  for (int t = n - 1; t >= 0; --t) {
    const T own = dscores[t * kChunk + t];
    for (int c = 0; c < ld; c += kLanes<T>) {
      const int at = t * ld + c;
      const Vec<T> to_x = load(s.dx + at), to_y = load(s.dy + at), xt = load(x + at), yt = load(y + at);
      const Vec<T> crossing = load(s.running + c) + (xt * to_x - yt * to_y);
      store(s.running + c, crossing);
      store(dg + at, load(dg + at) + crossing);
      store(dx + at, load(dx + at) + (to_x + own * yt));
      store(dy + at, load(dy + at) + (to_y + own * xt));
    }
  }
}

}  // namespace lcore::cpu::LCORE_ISA
