// Tile sizes of CPU attention.
#pragma once

#include <cstdint>

namespace lcore::cpu::LCORE_ISA {

// Keys between absolute multiples of this are one span: spans are reduced on their own and merged in order, so that one
// token against a long cache can use every core and still gives the bits of a prefill.
inline constexpr int64_t kSpan = 4096;

struct TileSize {
  int rows;  // query rows: positions times the query heads that share a kv head
  int keys;
};

// Q, the scores, the output twice, K and V of a tile stand in L2 (1 MB) together; the sizes are of float. Measured: 384
// rows instead of 192 are worth 5 %, since widening a block of keys costs what 40 rows of products do.
constexpr TileSize forward_tile(int head_dim) {
  if (head_dim <= 64) return {384, 128};   // 96 + 192 + 2*96 + 32 + 32 = 544 KB
  if (head_dim <= 128) return {384, 128};  // 192 + 192 + 2*192 + 64 + 64 = 896 KB
  if (head_dim <= 256) return {96, 64};    // 96 + 24 + 2*96 + 64 + 64 = 440 KB
  return {48, 64};                         // d 512: 96 + 12 + 2*96 + 128 + 128 = 556 KB
}

// Two score tiles, Q and dO, K and V in both orientations, one or two gradients.
constexpr TileSize backward_tile(int head_dim) {
  if (head_dim <= 128) return {144, 128};  // 2*72 + 2*72 + 4*64 + 72 + 64 = 680 KB
  return {48, 64};                         // d 256: 2*12 + 2*48 + 4*64 + 2*64 = 504 KB
}

}  // namespace lcore::cpu::LCORE_ISA
