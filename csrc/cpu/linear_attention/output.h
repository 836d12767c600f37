// From what queries read to rows of the output, and back: with skip y + D v, with a gate y silu(z) (Mamba-2), with a
// stabilizer y / max(|q^T n|, e^-m) (mLSTM), where q^T n stands in one more column. m cancels: its gradient is 0.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/gates.h"
#include "cpu/linear_attention/tensors.h"

namespace lcore::cpu::LCORE_ISA {

template <class T>
struct Output {
  const LinearAttentionParams& p;
  int ld_v;
  T* v;     // [tokens][ld_v], without weight; with skip
  T* gate;  // [tokens][ld_v]
  T* skip;  // [ld_v]: the head's

  Output(const LinearAttentionParams& params, int ld, Arena& arena) : p(params), ld_v(ld) {
    for (T** tile : {&v, &gate}) *tile = arena.take<T>(kChunk * ld_v);
    skip = arena.take<T>(ld_v);
  }

  // Whether a gradient needs what queries read.
  bool needs_rows() const { return p.gate.data != nullptr || p.stabilizer != nullptr; }

  void load_tiles(const LinearItem& item, int64_t token, int n) {
    if (p.gate.data != nullptr) {
      load_tensor(rows_at(p.gate, p.type, item, item.head, token, item.column), n, item.columns, gate, ld_v);
    }
    if (p.skip == nullptr) return;
    load_tensor(rows_at(p.v, p.type, item, item.head, token, item.column), n, item.columns, v, ld_v);
    const T* row = static_cast<const T*>(p.skip) + item.head * p.value_dim + item.column;
    std::fill(std::copy(row, row + item.columns, skip), skip + ld_v, T{0});
  }

  // Of n tokens from `token` on, in place.
  void apply(const LinearItem& item, int64_t token, int n, T* rows) {
    load_tiles(item, token, n);
    for (int t = 0; t < n; ++t) {
      T* row = rows + t * ld_v;
      const T norm = p.stabilizer == nullptr ? T{1} : std::max(std::abs(row[item.columns]), least(item, token + t));
      for (int c = 0; c < ld_v; c += kLanes<T>) {
        Vec<T> y = with_skip(row, t, c);
        if (p.gate.data != nullptr) y *= silu<T>(load(gate + t * ld_v + c));
        store(row + c, p.stabilizer == nullptr ? y : y / norm);
      }
    }
  }

  // From dout, in place, to the gradient of what queries read, `rows`; that of skip is added to dskip [ld_v].
  void gradients(const LinearAttentionGradParams& g, const LinearItem& item, int64_t token, int n, const T* rows,
                 T* dout, T* dskip) {
    load_tiles(item, token, n);
    for (int t = 0; t < n; ++t) {
      const T* row = rows + t * ld_v;
      T* d = dout + t * ld_v;
      if (p.gate.data != nullptr) {
        for (int c = 0; c < ld_v; c += kLanes<T>) {
          T* place = gate + t * ld_v + c;
          const Vec<T> z = load(place), slope = load(d + c), s = sigmoid<T>(z);
          store(place, slope * with_skip(row, t, c) * silu_slope<T>(z, s));
          store(d + c, slope * z * s);
        }
        const int64_t index = row_index(p, item, token + t, p.heads, item.head) * p.value_dim;
        store_tensor(gate + t * ld_v, p.value_dim, element_at(g.dgate, p.type, index), p.type);
      }
      if (p.stabilizer != nullptr) divide(row, least(item, token + t), item.columns, d);
      if (p.skip == nullptr) continue;
      for (int c = 0; c < ld_v; c += kLanes<T>)
        store(dskip + c, load(dskip + c) + load(d + c) * load(v + t * ld_v + c));
    }
  }

 private:
  Vec<T> with_skip(const T* row, int t, int c) const {
    return p.skip == nullptr ? load(row + c) : load(row + c) + load(skip + c) * load(v + t * ld_v + c);
  }

  // e^-m of a token; where m is so large that this is 0, still a number to divide by.
  T least(const LinearItem& item, int64_t token) const {
    const T m = static_cast<const T*>(p.stabilizer)[row_index(p, item, token, p.heads, item.head)];
    return std::max(std::exp(-m), std::numeric_limits<T>::min());
  }

  // d of y / max(|norm|, least) to d of y, and behind its columns to d of norm.
  void divide(const T* row, T least, int columns, T* d) const {
    const T norm = std::max(std::abs(row[columns]), least);
    Vec<T> sum{};
    for (int c = 0; c < ld_v; c += kLanes<T>) {
      sum += load(d + c) * (load(row + c) / norm);
      store(d + c, load(d + c) / norm);
    }
    const T slope = reduce_add<T>(sum) / norm;
    d[columns] = row[columns] > least ? -slope : (row[columns] < -least ? slope : T{0});
  }
};

}  // namespace lcore::cpu::LCORE_ISA
