// Tile sizes of CPU attention.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"

namespace lcore::cpu::LCORE_ISA {

// Keys between absolute multiples of this are one span: spans are reduced on their own and merged in order, so that one
// token against a long cache can use every core and still gives the bits of a prefill.
inline constexpr int64_t kSpan = 4096;

struct TileSize {
  int rows;  // query rows: positions times the query heads that share a kv head; a multiple of kTileRows
  int keys;  // divides kSpan
};

// K and V of a block of keys, Q, the scores and the output of a tile of rows stand in L2 (512 KB) together; sizes are
// of float. More keys a block cost each row fewer running maxima and each sum fewer loads and stores of its output.
constexpr TileSize forward_tile(int head_dim) {
  if (head_dim <= 64) return {48, 256};   // 64 + 64 + 12 + 51 + 12 = 203 KB
  if (head_dim <= 128) return {48, 256};  // 128 + 128 + 24 + 51 + 24 = 355 KB
  if (head_dim <= 256) return {48, 128};  // 128 + 128 + 48 + 27 + 48 = 379 KB
  return {48, 64};                        // d 512: 128 + 128 + 96 + 15 + 96 = 463 KB
}

// Rows of an item: all of them use a block of keys once it is packed, which costs what 20 rows of products do. Their
// queries and outputs take 512 KB; four times as many were 5 to 10 % slower where other tenants share L3.
constexpr int most_item_rows(int head_dim) { return head_dim <= 64 ? 1024 : 512; }

// Scratch of all workers together: what attention may take beyond its inputs and outputs.
inline constexpr int64_t kMostScratchBytes = int64_t{48} << 20;

// Two tiles of scores, Q and dO twice, K in both orientations, V in one, two gradients.
constexpr TileSize backward_tile(int head_dim) {
  if (head_dim <= 128) return {96, 128};  // 2*54 + 4*48 + 3*64 + 2*64 = 620 KB, of which a product uses a third
  return {48, 64};                        // d 256: 2*15 + 4*48 + 3*64 + 2*64 = 542 KB
}

// Elements of a row of scores: an odd number of cache lines, or the lines of a column would share a few sets of L1.
template <class T>
constexpr int odd_lines(int keys) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  return ((keys + kLine - 1) / kLine | 1) * kLine;
}

}  // namespace lcore::cpu::LCORE_ISA
