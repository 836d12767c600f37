// Where the tokens of one head of one sequence lie, and their rows as the kernels of linear attention want them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/linear_attention.h"
#include "cpu/masked_gemm.h"
#include "cpu/pack_columns.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// Tokens that are computed together, cut at absolute multiples of a sequence: a state that is handed over at such a
// multiple leaves all bits as they are.
inline constexpr int kChunk = 64;

// Columns [column, column + columns) of the values of one head.
struct LinearItem {
  int64_t sequence;
  int64_t head;
  int64_t begin;  // first token in the tensors' seq dimension
  int64_t length;
  int column;
  int columns;

  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int tokens(int64_t chunk) const { return static_cast<int>(std::min<int64_t>(kChunk, length - chunk * kChunk)); }
};

// The longest first, so that the last items to finish are short. With `splits` > 1 the values of a head are cut: each
// of their columns has a state of its own, so this changes no bits.
template <class T>
std::vector<LinearItem> linear_items(const LinearAttentionParams& p, int splits) {
  const int step = (p.value_dim / std::max(splits, 1) + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  const int width = std::max(step, kPanel<T>);
  std::vector<LinearItem> items;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t begin = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[b];
    const int64_t length = p.cu_seqlens == nullptr ? p.seq : p.cu_seqlens[b + 1] - begin;
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int c = 0; c < p.value_dim; c += width) {
        items.push_back({b, h, begin, length, c, std::min(width, p.value_dim - c)});
      }
    }
  }
  const auto longer = [](const LinearItem& a, const LinearItem& b) { return a.length > b.length; };
  std::stable_sort(items.begin(), items.end(), longer);
  return items;
}

// Rows of one head of a tensor, from a token of the item on.
inline RowsIn rows_at(const Strided& x, DType type, const LinearItem& item, int64_t head, int64_t token,
                      int64_t column = 0) {
  const int64_t index = item.sequence * x.batch + (item.begin + token) * x.seq + head * x.head + column * x.dim;
  return {static_cast<const char*>(x.data) + index * static_cast<int64_t>(size_of(type)), type, x.seq, x.dim};
}

// Asks for the next chunk's rows while this one is computed: tokens lie far apart, where the hardware does not look.
inline void prefetch_next_chunk(const RowsIn& in, int cols) {
  with_type(in.data, in.type, [&](const auto* src) {
    constexpr int kLine = 64 / sizeof(*src);
    for (int r = kChunk; r < 2 * kChunk; ++r) {
      for (int c = 0; c < cols; c += kLine) __builtin_prefetch(src + r * in.row_stride + c * in.col_stride);
    }
    __asm__ volatile("");  // g++ deletes calls that do nothing but prefetch
  });
}

inline int64_t qk_head(const LinearAttentionParams& p, const LinearItem& item) {
  return item.head * p.qk_heads / p.heads;
}

// Index of a token in tensors (batch, seq, heads), contiguous; packed tensors have no batch.
inline int64_t row_index(const LinearAttentionParams& p, const LinearItem& item, int64_t token, int64_t heads,
                         int64_t head) {
  const int64_t at = item.begin + token + (p.cu_seqlens == nullptr ? item.sequence * p.seq : 0);
  return at * heads + head;
}

inline void* element_at(void* data, DType type, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(size_of(type));
}

template <class T>
inline constexpr DType kTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Columns of a state beside `columns` of v: with a stabilizer one more, what a value that is always 1 leaves.
inline int state_columns(const LinearAttentionParams& p, int columns) {
  return columns + (p.stabilizer != nullptr ? 1 : 0);
}

// One column of packed panels over `depth` steps.
template <class T>
void set_column(const T* values, T* panels, int depth, int cols, int column) {
  const int lane = column % kLanes<T>;
  const PanelColumns<T> place = in_panels(panels, depth, cols, column - lane);
  for (int step = 0; step < depth; ++step) place.data[int64_t{step} * place.width + lane] = values[step];
}

// Row `step` of packed panels over `depth` steps, in order.
template <class T>
void row_from_panels(T* panels, int depth, int cols, int step, T* row) {
  for_each_vector(panels, depth, cols, step, [&](T* place, int c) { store(row + c, load(place)); });
}

// Row t of panels over n tokens times factors[t].
template <class T>
void scale_rows(T* panels, int n, int cols, const T* factors) {
  for (int t = 0; t < n; ++t) {
    for_each_vector(panels, n, cols, t, [&](T* place, int) { store(place, load(place) * factors[t]); });
  }
}

// C = A B where C too is packed panels over `c_depth` steps: what one product makes is the B of the next.
template <class M, Accumulate kMode>
void gemm_to_panels(const MatrixA<typename M::In>& a, const typename M::In* b, int depth, typename M::Out* c,
                    int c_depth, int rows, int cols, const typename M::Out* row_scale = nullptr) {
  constexpr int kWidth = kPanel<typename M::In>;
  for (int j = 0; j < cols; j += kWidth) {
    const int width = std::min(kWidth, cols - j);
    gemm<M, kMode>(a, b + int64_t{j} * depth, depth, {0, depth}, c + int64_t{j} * c_depth, width, rows, width,
                   row_scale);
  }
}

// C += A B into panels over n rows, where row r of A has weight in taken(r, 1) alone (gemm_masked).
template <class M, class Taken>
void gemm_masked_to_panels(const MatrixA<typename M::In>& a, typename M::In* b, int n, typename M::Out* c, int cols,
                           const Taken& taken) {
  constexpr int kWidth = kPanel<typename M::In>;
  const bool finite = all_finite(b, int64_t{n} * cols);
  for (int j = 0; j < cols; j += kWidth) {
    const int width = std::min(kWidth, cols - j);
    gemm_masked<M, Accumulate::kAdd>(a, b + int64_t{j} * n, n, finite, c + int64_t{j} * n, width, n, width, taken);
  }
}

}  // namespace lcore::cpu::LCORE_ISA
