// A block's shared memory in tiles.cu, and where packs of a tile stand in it: swizzled, so that fragments are read
// without bank conflicts, or with two.
#pragma once

#include <bit>

#include "cuda/generic/attention_paged/coded.cuh"
#include "cuda/generic/attention_paged/rows.cuh"

namespace lcore::cuda::generic {

constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarpLanes;
constexpr int kStages = 2;  // of a ring: one is read while one comes; 8 KB each at head_dim 128
constexpr int kPlainShift = 4;
constexpr int kPlainKeys =
    1 << kPlainShift;         // of a tile: a step of mma.sync; 8 KB of K and V at head_dim 128, as of codes below
constexpr int kMostIds = 64;  // pages of a unit: 512 keys in pages, or parts of pages, of 16 and more

constexpr int tile_keys(PageFormat format) {
  return is_plain(format) ? kPlainKeys : format == PageFormat::kInt8 ? 32 : 64;
}

// Rows of words of K.
constexpr int key_words(PageFormat format, int dim) { return static_cast<int>(steps_of(format, dim)); }

// A block's shared memory, offsets in bytes.
struct Ring {
  int states;
  int totals;
  int queries;
  int folded;
  int total;
  int stages;
  int stage_bytes;  // K, then V
  int v_begin;
  int k_row;  // bytes of a row of values
  int v_row;
  int coded_shift;  // log2 of a tile's keys where K or V is coded
  int page_shift;   // log2 of a page's
  int shared_bytes;
  PageSide k_side;
  PageSide v_side;

  static Ring lay_out(const PagedParams& p) {
    const KvPages& pages = p.pages;
    const int dim = p.a.head_dim, dim_v = p.a.head_dim_v;
    const auto line = [](int bytes) { return (bytes + 127) / 128 * 128; };
    Ring r{};
    r.k_side = page_side(pages.k_format, false, pages.page_size, dim);
    r.v_side = page_side(pages.v_format, true, pages.page_size, dim_v);
    const int keys =
        std::min({tile_keys(pages.k_format), tile_keys(pages.v_format), static_cast<int>(pages.page_size)});
    r.coded_shift = std::countr_zero(static_cast<unsigned>(keys));
    r.page_shift = std::countr_zero(static_cast<unsigned>(pages.page_size));
    r.k_row = line(2 * dim);
    r.v_row = line(2 * dim_v);
    int k_bytes = kPlainKeys * r.k_row, v_bytes = kPlainKeys * r.v_row;
    if (is_integer(pages.k_format)) {
      k_bytes = std::max(k_bytes, key_words(pages.k_format, dim) * keys * 4 + 4 * dim);
    }
    if (is_integer(pages.v_format)) {
      const int rows = keys / (2 * planes_of(pages.v_format));
      v_bytes = std::max(v_bytes, rows * dim_v * 4 + 4 * static_cast<int>(value_groups(dim_v)) * keys);
    }
    r.v_begin = line(k_bytes);
    r.stage_bytes = r.v_begin + line(v_bytes);
    const int fragments = dim / 16 * kWarpLanes * 16;
    r.states = kMostIds * 4;
    r.totals = r.states + kTileWarps * 16 * 2 * 4;
    r.queries = r.totals + 2 * 16 * 2 * 4;
    r.folded = r.queries + fragments;
    r.total = r.folded + (is_integer(pages.k_format) ? kTileWarps * fragments : 0);
    r.stages = line(r.total + (p.partial == nullptr ? 16 * dim_v * 4 : 0));
    r.shared_bytes = r.stages + std::max(kTileWarps * kStages * r.stage_bytes, kTileWarps * 16 * dim_v * 4);
    return r;
  }
};

struct TilesParams {
  PagedParams p;
  Ring ring;
};

// Bytes to the pack `chunk` of a row of values: rows 0, 1, 4, 5 and 8, 9, 12, 13, which are read together, stand in
// different banks.
__device__ inline int value_at(int row, int chunk, int row_bytes) {
  return row * row_bytes + (chunk ^ (2 * (row & 1) | (row & 4) | (row >> 3 & 1))) * 16;
}

// Words to a word of codes: neighbouring rows, read together, stand in different banks where a row is whole lines.
__device__ inline int word_at(int row, int column, int columns) {
  const int swizzle = columns % 32 == 0 ? 4 * (row & 1) | (row & 2) : 0;
  return row * columns + ((column / 4) ^ swizzle) * 4 + column % 4;
}

}  // namespace lcore::cuda::generic
