// (I + L) X = B and (I + L)^T X = B for a strictly lower triangular L of a chunk, X in place of B in packed panels:
// substitution by blocks of 16 tokens, products between blocks. No inverse is formed, whose entries may be enormous.
// `minus` holds -L in rows of kChunk.
#pragma once

#include "cpu/linear_attention/item.h"
#include "cpu/linear_attention/pairs.h"

namespace lcore::cpu::LCORE_ISA {

// row i += factor * row j of one panel.
template <class T>
void add_row(T factor, const T* row_j, T* row_i, int width) {
  for (int c = 0; c < width; c += kLanes<T>) store(row_i + c, load(row_i + c) + factor * load(row_j + c));
}

template <class T>
void solve_lower(const T* minus, int n, T* panels, int cols) {
  for (int c = 0; c < cols; c += kPanel<T>) {
    const int width = std::min(kPanel<T>, cols - c);
    T* x = panels + int64_t{c} * n;
    for (int first = 0; first < n; first += kSubChunk) {
      const int last = std::min(first + kSubChunk, n);
      gemm<Widened<T>, Accumulate::kAdd>({minus + first * kChunk, kChunk, 1}, x, n, {0, first}, x + first * width,
                                         width, last - first, width);
      for (int i = first + 1; i < last; ++i) {
        for (int j = first; j < i; ++j) add_row(minus[i * kChunk + j], x + j * width, x + i * width, width);
      }
    }
  }
}

template <class T>
void solve_lower_transposed(const T* minus, int n, T* panels, int cols) {
  for (int c = 0; c < cols; c += kPanel<T>) {
    const int width = std::min(kPanel<T>, cols - c);
    T* x = panels + int64_t{c} * n;
    for (int first = (n - 1) / kSubChunk * kSubChunk; first >= 0; first -= kSubChunk) {
      const int last = std::min(first + kSubChunk, n);
      gemm<Widened<T>, Accumulate::kAdd>({minus + first, 1, kChunk}, x, n, {last, n}, x + first * width, width,
                                         last - first, width);
      for (int j = last - 2; j >= first; --j) {
        for (int i = j + 1; i < last; ++i) add_row(minus[i * kChunk + j], x + i * width, x + j * width, width);
      }
    }
  }
}

}  // namespace lcore::cpu::LCORE_ISA
