// How tiles of keys of a paged cache come into a warp's ring in shared memory: as they are stored, in packs of 16
// bytes.
#pragma once

#include "cuda/generic/attention_paged/tile_list.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/shared.h"

namespace lcore::cuda::generic {

// One side of a tile, by one warp.
class SideBringer {
 public:
  __device__ SideBringer(const PagedParams& p, int64_t slot, int64_t k_len, const Tile& tile, const PageIds& ids,
                         const Ring& ring, bool value, uint8_t* stage, int lane)
      : pages_(p.pages),
        ring_(ring),
        tile_(tile),
        value_(value),
        stage_(stage + (value ? ring.v_begin : 0)),
        lane_(lane),
        dim_(value ? p.a.head_dim_v : p.a.head_dim) {
    const int64_t page = tile.begin >> ring.page_shift;
    in_page_ = static_cast<int>(tile.begin & (pages_.page_size - 1));
    rows_ = k_len - tile.begin < kPlainKeys ? static_cast<int>(k_len - tile.begin) : kPlainKeys;
    if (page >= k_len >> ring.page_shift) {
      const auto* tail = static_cast<const uint8_t*>(value ? pages_.tail_v : pages_.tail_k);
      side_ = tail + slot * pages_.page_size * dim_ * 2;
    } else if (page < pages_.plain_pages) {
      const int tokens = static_cast<int>(pages_.page_size / pages_.parts);
      side_ = pages_.pool + ids[pages_.column(page) + in_page_ / tokens] * pages_.page_bytes;
      side_ += value ? pages_.plain_v_offset : 0;
      in_page_ %= tokens;
    } else {
      side_ = pages_.pool + ids[pages_.column(page)] * pages_.page_bytes + (value ? pages_.v_offset : 0);
    }
  }

  __device__ void bring() const {
    if (!(value_ ? tile_.v_coded : tile_.k_coded)) return values();
    const PageFormat format = pages_.format(value_);
    const PageSide& side = value_ ? ring_.v_side : ring_.k_side;
    const int codes = 2 * planes_of(format), size = static_cast<int>(pages_.page_size);
    if (value_) {
      const int rows = tile_.keys / codes, groups = static_cast<int>(value_groups(dim_));
      words(side_ + in_page_ / codes * dim_ * 4, dim_, rows, dim_);
      uint8_t* grid = stage_ + rows * dim_ * 4;
      for (int g = 0; g < groups; ++g) {
        const int from = (g * size + in_page_) * 2, to = g * tile_.keys * 2;
        copy(grid + to, side_ + side.scales + from, tile_.keys * 2);
        copy(grid + groups * tile_.keys * 2 + to, side_ + side.zeros + from, tile_.keys * 2);
      }
    } else {
      const int rows = key_words(format, dim_);
      words(side_ + in_page_ * 4, size, rows, tile_.keys);
      uint8_t* grid = stage_ + rows * tile_.keys * 4;
      copy(grid, side_ + side.scales, dim_ * 2);
      copy(grid + dim_ * 2, side_ + side.zeros, dim_ * 2);
    }
  }

 private:
  // fn(row, pack) for this lane's packs: without a division each.
  template <class F>
  __device__ void each_pack(int rows, int packs, F&& fn) const {
    const int rows_on = kWarpLanes / packs, packs_on = kWarpLanes % packs;
    int row = lane_ / packs, pack = lane_ % packs;
    while (row < rows) {
      fn(row, pack);
      row += rows_on;
      pack += packs_on;
      if (pack >= packs) {
        pack -= packs;
        ++row;
      }
    }
  }

  // Rows of values, zeros behind the slot's last key.
  __device__ void values() const {
    const int packs = dim_ / 8, row_bytes = value_ ? ring_.v_row : ring_.k_row;
    each_pack(kPlainKeys, packs, [&](int row, int pack) {
      const uint8_t* from = side_ + (int64_t{in_page_ + row} * dim_ + pack * 8) * 2;
      cp_async<kPackBytes>(stage_ + value_at(row, pack, row_bytes), row < rows_ ? from : side_, row < rows_ ? 16 : 0);
    });
  }

  // `rows` rows of `columns` words, `stride` words apart.
  __device__ void words(const uint8_t* from, int stride, int rows, int columns) const {
    each_pack(rows, columns / 4, [&](int row, int pack) {
      cp_async<kPackBytes>(stage_ + word_at(row, 4 * pack, columns) * 4, from + (row * stride + 4 * pack) * 4);
    });
  }

  __device__ void copy(uint8_t* to, const uint8_t* from, int bytes) const {
    for (int i = lane_ * kPackBytes; i < bytes; i += kWarpLanes * kPackBytes) cp_async<kPackBytes>(to + i, from + i);
  }

  const KvPages& pages_;
  const Ring& ring_;
  const Tile& tile_;
  bool value_;
  uint8_t* stage_;
  int lane_;
  int dim_;
  int in_page_;  // the tile's first row of the page or part
  int rows_;     // of values that are there
  const uint8_t* side_;
};

__device__ inline void bring_tile(const PagedParams& p, int64_t slot, int64_t k_len, const Tile& tile,
                                  const PageIds& ids, const Ring& ring, uint8_t* stage, int lane) {
  SideBringer(p, slot, k_len, tile, ids, ring, false, stage, lane).bring();
  SideBringer(p, slot, k_len, tile, ids, ring, true, stage, lane).bring();
}

}  // namespace lcore::cuda::generic
