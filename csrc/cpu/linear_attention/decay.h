// Decay a_t = e^{g_t} of the tokens of a chunk, one number a token or one for each key channel, and its running
// products. Products, not exponentials of differences of sums: a difference of two long sums has the error of the sums,
// and nothing here is ever divided by a decay, so that 0 is as good as any.
#pragma once

#include <cmath>

#include "cpu/linear_attention/tensors.h"
#include "cpu/math.h"

namespace lcore::cpu::LCORE_ISA {

template <class T, bool kChannel>
struct Decay {
  int ld;     // key_dim padded to vectors; not used without channels
  T* step;    // [tokens][ld], or [tokens]: a_t
  T* prefix;  // a_0 ... a_t: from the state before the chunk to token t
  T* suffix;  // a_{t+1} ... of the last: from token t to the state behind the chunk

  Decay(int ld_key, Arena& arena) : ld(ld_key) {
    for (T** table : {&step, &prefix, &suffix}) *table = arena.take<T>(kChannel ? kChunk * ld : kChunk);
  }

  // Channels c.. of a row of a table.
  Vec<T> at(const T* table, int t, int c) const {
    if constexpr (kChannel) return load(table + t * ld + c);
    return splat(table[t]);
  }

  void load_tokens(const LinearAttentionParams& p, const LinearItem& item, int64_t token, int n) {
    const RowsIn g = rows_at(p.g, p.g_type, item, item.head, token);
    if constexpr (kChannel) {
      load_tensor(g, n, p.key_dim, step, ld);
      for (int i = 0; i < n * ld; i += kLanes<T>) store(step + i, exp(load(step + i)));
    } else {
      load_tensor(g, n, 1, step, 1);
      for (int t = 0; t < n; ++t) step[t] = std::exp(step[t]);
    }
    const int width = kChannel ? ld : 1;
    std::copy(step, step + width, prefix);
    for (int i = width; i < n * width; ++i) prefix[i] = prefix[i - width] * step[i];
    std::fill(suffix + (n - 1) * width, suffix + n * width, T{1});
    for (int i = (n - 1) * width - 1; i >= 0; --i) suffix[i] = suffix[i + width] * step[i + width];
  }

  // The decay of the whole chunk for each key channel: what a state's rows are multiplied by.
  void total(int n, T* rows) const {
    for (int c = 0; c < ld; c += kLanes<T>) store(rows + c, at(prefix, n - 1, c));
  }

  // y = x times the rows of a table.
  void apply(const T* table, const T* x, int n, T* y) const {
    for (int t = 0; t < n; ++t) {
      for (int c = 0; c < ld; c += kLanes<T>) store(y + t * ld + c, load(x + t * ld + c) * at(table, t, c));
    }
  }
};

}  // namespace lcore::cpu::LCORE_ISA
