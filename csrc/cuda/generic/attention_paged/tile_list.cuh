// A slot's keys as tiles of one page each, at absolute multiples of their size.
#pragma once

#include "cuda/generic/attention_paged/ring.cuh"

namespace lcore::cuda::generic {

struct Tile {
  int64_t begin;
  int keys;
  bool k_coded;
  bool v_coded;
};

// A slot's keys as tiles at absolute multiples of their size, and whose turn each is.
class TileList {
 public:
  __device__ TileList(const KvPages& pages, int64_t k_len, const Ring& ring)
      : coded_shift_(ring.coded_shift), k_coded_(is_integer(pages.k_format)), v_coded_(is_integer(pages.v_format)) {
    coded_end_ = k_len >> ring.page_shift << ring.page_shift;
    coded_begin_ = pages.plain() ? coded_end_ : pages.plain_pages * pages.page_size;
  }
  __device__ Tile at(int64_t key) const {
    if (is_coded(key)) return {key, 1 << coded_shift_, k_coded_, v_coded_};
    return {key, kPlainKeys, false, false};
  }
  __device__ int64_t first(KeyRange keys, int warp) const {
    return own(keys.begin >> shift(keys.begin) << shift(keys.begin), keys, warp);
  }
  __device__ int64_t next(int64_t key, KeyRange keys, int warp) const {
    return own(key + (int64_t{1} << shift(key)), keys, warp);
  }

 private:
  __device__ bool is_coded(int64_t key) const { return key >= coded_begin_ && key < coded_end_; }
  __device__ int shift(int64_t key) const { return is_coded(key) ? coded_shift_ : kPlainShift; }
  __device__ int64_t own(int64_t key, KeyRange keys, int warp) const {
    while (key < keys.end && (key >> shift(key)) % kTileWarps != warp) key += int64_t{1} << shift(key);
    return key;
  }

  int64_t coded_begin_;
  int64_t coded_end_;
  int coded_shift_;  // log2 of a tile's keys
  bool k_coded_;
  bool v_coded_;
};

// The table's entries of a unit's full pages, in shared memory.
struct PageIds {
  const int32_t* ids;
  int64_t first;
  __device__ int64_t operator[](int64_t column) const { return ids[column - first]; }
};

// By all threads; a barrier of the block must follow.
__device__ inline PageIds load_ids(const KvPages& pages, int64_t slot, int64_t k_len, int64_t key, int32_t* ids) {
  const int64_t first = pages.column(key / pages.page_size), last = key + kUnit < k_len ? key + kUnit : k_len;
  const int64_t count = pages.column(last / pages.page_size) - first;
  for (int i = threadIdx.x; i < count; i += kTileThreads) {
    ids[i] = pages.page_table[slot * pages.table_width + first + i];
  }
  return {ids, first};
}

}  // namespace lcore::cuda::generic
