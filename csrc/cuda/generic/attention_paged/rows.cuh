// What the kernels of attention over a paged cache share: which rows and keys there are, and which see which.
// Keys are reduced in units cut at absolute multiples of kUnit, each from a fresh state; the units' states are folded
// in order. A block may do its units one after the other, or leave each to a block of its own (decode) and the folding
// to merge.cu: the bits are the same, for one token as for a whole prompt.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/attention.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {

constexpr int kUnit = 512;          // 128 KB of bf16 K and V at head_dim 128: long beside a block's start
constexpr int kMergeThreads = 128;  // a channel each
constexpr float kLog2E = 1.4426950408889634f;

struct PagedParams {
  AttentionParams a;  // without a.pages, which is the host's
  KvPages pages;
  int tile_rows;  // query rows a block, of all heads of a group
  int64_t row_tiles;
  int64_t units;  // at most, of a slot: what the host knows without reading lengths
  float*
      partial;  // [slots][row_tiles][units][tile_rows][2 + head_dim_v]: max, sum, out; or nullptr: one block does all

  __device__ float* state(int64_t slot, int64_t tile, int64_t unit, int row) const {
    return partial + (((slot * row_tiles + tile) * units + unit) * tile_rows + row) * (2 + a.head_dim_v);
  }
};

struct KeyRange {
  int64_t begin;
  int64_t end;
};

__device__ inline int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// A (sequence, kv head). Its rows pack the query heads that share the kv head: row f is position f / group, head
// f % group of the group.
struct Slot {
  int64_t index;
  int64_t batch;
  int64_t kv_head;
  int64_t group;
  int64_t q_len;
  int64_t k_len;

  __device__ Slot(const PagedParams& p, int64_t at)
      : index(at), batch(at / p.a.kv_heads), kv_head(at % p.a.kv_heads), group(p.a.heads / p.a.kv_heads) {
    q_len = p.a.q_lengths == nullptr ? p.a.seq_q : p.a.q_lengths[batch];
    k_len = p.pages.lengths[index];
  }
  __device__ int64_t rows() const { return q_len * group; }
  __device__ int64_t head(int64_t row) const { return kv_head * group + row % group; }
  // Of a row's query among the keys.
  __device__ int64_t place(int64_t row) const { return row / group + k_len - q_len; }
  __device__ KeyRange visible(const AttentionParams& a, int64_t row) const {
    const int64_t at = place(row);
    return {clamped(at - a.window_left, 0, k_len), clamped(at + a.window_right + 1, 0, k_len)};
  }
  // Keys that any of the rows [row, row + count) may see; some of them must be rows of the slot.
  __device__ KeyRange visible(const AttentionParams& a, int64_t row, int count) const {
    const int64_t last = row + count < rows() ? row + count : rows();
    return {visible(a, row).begin, visible(a, last - 1).end};
  }
};

// Keys of one unit out of a range.
__device__ inline KeyRange of_unit(KeyRange keys, int64_t unit) {
  return {clamped(unit * kUnit, keys.begin, keys.end), clamped((unit + 1) * kUnit, keys.begin, keys.end)};
}

// A row's score from its dot product, times log2 e; -inf where the key is not seen. Keys fit 32 bits, as lengths do.
struct RowScore {
  int begin = 0;
  int end = 0;
  int place = 0;
  float scale;
  float cap;
  float slope;

  __device__ RowScore(const AttentionParams& a, const Slot& s, int64_t row)
      : scale(static_cast<float>(a.softmax_scale)), cap(static_cast<float>(a.softcap)), slope(0) {
    if (row >= s.rows()) return;
    const KeyRange keys = s.visible(a, row);
    begin = static_cast<int>(keys.begin);
    end = static_cast<int>(keys.end);
    place = static_cast<int>(s.place(row));
    if (a.alibi_slopes != nullptr) slope = a.alibi_slopes[s.batch * a.alibi_batch + s.head(row)];
  }
  __device__ float operator()(float dot, int key) const {
    if (key < begin || key >= end) return -INFINITY;
    float score = dot * scale;
    if (cap > 0) score = cap * tanhf(score / cap);
    if (slope != 0) score -= slope * fabsf(static_cast<float>(place - key));
    return score * kLog2E;
  }
};

// The families of kernels; `split`: a unit a block.
void attention_expanded(const PagedParams& params, Stream& stream);
bool has_tiles(const PagedParams& params);
void attention_tiles(const PagedParams& params, Stream& stream);
void attention_merge(const PagedParams& params, Stream& stream);

// Blocks: (units or 1) a slot by row tiles.
inline dim3 grid_of(const PagedParams& p) {
  const int64_t slots = p.a.batch * p.a.kv_heads;
  return dim3(static_cast<unsigned>(slots * (p.partial == nullptr ? 1 : p.units)), static_cast<unsigned>(p.row_tiles));
}

}  // namespace lcore::cuda::generic
