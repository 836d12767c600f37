// Which sequence, head and tile a block works on, and which rows see which keys: dense and packed inputs look alike
// from here on.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/attention.h"

namespace lcore::cuda {

// Positions are int in kernels. No window that is longer hides more.
constexpr int64_t kMostTokens = int64_t{1} << 29;

struct Range {
  int begin;
  int end;
};

struct Sequence {
  int64_t batch;
  int64_t q_begin;  // first row in the tensor's seq dimension
  int64_t k_begin;
  int q_len;
  int k_len;
};

// Index i on one side sees, on the other, [i + low, i + high] within [0, count).
struct Band {
  int low;
  int high;
  int count;

  __device__ Range of(int i) const { return {min(max(i + low, 0), count), min(max(i + high + 1, 0), count)}; }
  // What any of [first, first + n) sees.
  __device__ Range of(int first, int n) const { return {of(first).begin, of(first + n - 1).end}; }
  // Whether each of [first, first + n) sees all of [other, other + others).
  __device__ bool whole(int first, int n, int other, int others) const {
    return of(first).end >= other + others && of(first + n - 1).begin <= other;
  }
};

__device__ inline Band keys_of_rows(const AttentionParams& p, const Sequence& s) {
  const int shift = s.k_len - s.q_len;
  return {shift - static_cast<int>(p.window_left), shift + static_cast<int>(p.window_right), s.k_len};
}

__device__ inline Band rows_of_keys(const AttentionParams& p, const Sequence& s) {
  const int shift = s.k_len - s.q_len;
  return {-shift - static_cast<int>(p.window_right), static_cast<int>(p.window_left) - shift, s.q_len};
}

__device__ inline int64_t q_token(const AttentionParams& p, const Sequence& s, int row) {
  return (p.cu_seqlens_q == nullptr ? s.batch * p.seq_q : s.q_begin) + row;
}

__device__ inline int64_t k_token(const AttentionParams& p, const Sequence& s, int key) {
  return (p.cu_seqlens_k == nullptr ? s.batch * p.seq_k : s.k_begin) + key;
}

__device__ inline int64_t lse_index(const AttentionParams& p, const Sequence& s, int head, int row) {
  return s.batch * p.lse_batch + head * p.lse_head + s.q_begin + row;
}

// Tiles of `size` rows, or keys, of every sequence and head, one a block. Packed sequences need no list: sequence i
// gets the places from offset / size + i on, enough for it wherever it begins; a block in a place too many returns.
struct Tiles {
  bool keys;
  int size;
  int64_t heads;
  int64_t places;  // a head's
  int64_t total;

  static Tiles of(const AttentionParams& p, bool keys, int size) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const int64_t heads = keys ? p.kv_heads : p.heads, tokens = keys ? p.seq_k : p.seq_q;
    const int64_t places = p.batch == 0 ? 0 : packed ? tokens / size + p.batch : (tokens + size - 1) / size;
    return {keys, size, heads, places, places * heads * (packed ? 1 : p.batch)};
  }
  dim3 grid() const {
    constexpr int64_t kMost = int64_t{1} << 30;
    const int64_t x = std::min(total, kMost);
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>((total + x - 1) / x));
  }
};

struct Work {
  Sequence sequence;
  int head;
  int begin;  // first row, or key
  int count;
};

// Tiles of a head stand side by side, so that blocks that run at the same time share its keys in L2; of causal tiles
// the longest come first: the last rows, the first keys.
__device__ inline bool find_work(const AttentionParams& p, const Tiles& tiles, Work& work) {
  const int64_t index = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  if (index >= tiles.total) return false;
  int64_t tile = index % tiles.places, rest = index / tiles.places;
  work.head = static_cast<int>(rest % tiles.heads);
  Sequence& s = work.sequence;
  if (p.cu_seqlens_q == nullptr) {
    s = {rest / tiles.heads, 0, 0, static_cast<int>(p.seq_q), static_cast<int>(p.seq_k)};
  } else {
    const int32_t* offsets = tiles.keys ? p.cu_seqlens_k : p.cu_seqlens_q;
    int64_t low = 0, high = p.batch;  // the last sequence whose first place is not behind `tile`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (offsets[middle] / tiles.size + middle <= tile ? low : high) = middle;
    }
    s = {low, p.cu_seqlens_q[low], p.cu_seqlens_k[low], p.cu_seqlens_q[low + 1] - p.cu_seqlens_q[low],
         p.cu_seqlens_k[low + 1] - p.cu_seqlens_k[low]};
    tile -= offsets[low] / tiles.size + low;
  }
  const int length = tiles.keys ? s.k_len : s.q_len;
  const int used = (length + tiles.size - 1) / tiles.size;
  if (tile >= used) return false;
  work.begin = static_cast<int>(tiles.keys ? tile : used - 1 - tile) * tiles.size;
  work.count = min(tiles.size, length - work.begin);
  return true;
}

// The params as kernels want them; refuses what positions in int cannot count.
inline AttentionParams for_kernels(const AttentionParams& given, const char* op) {
  AttentionParams p = given;
  if (std::max(p.seq_q, p.seq_k) > kMostTokens) {
    throw std::runtime_error(std::string("lcore.") + op + ": the CUDA kernels count at most " +
                             std::to_string(kMostTokens) + " tokens, got " +
                             std::to_string(std::max(p.seq_q, p.seq_k)));
  }
  p.window_left = std::min(p.window_left, kMostTokens);
  p.window_right = std::min(p.window_right, kMostTokens);
  return p;
}

}  // namespace lcore::cuda
