// NaN and infinity where not every row of a tile may see them. A weight of 0 does not keep them out of a product: 0 x
// NaN is NaN. So tiles that the mask cuts are scrubbed, zeros in their place, and once the results stand in memory each
// one that should have met them gets them. Both halves cost a scan of the tiles at the mask's edge, and rare work.
#pragma once

#include "cuda/generic/attention/shared_tile.cuh"

namespace lcore::cuda {

// Whether this thread found any; a barrier must follow before others read the tile.
template <int kThreads, class T, int kRows, int kDim>
__device__ bool scrub(const SharedTile<T, kRows, kDim>& tile) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  bool found = false;
  for (int i = threadIdx.x; i < tile.kPieces; i += kThreads) {
    uint4* const piece = reinterpret_cast<uint4*>(tile.data) + i;
    const uint4 old = *piece;
    uint32_t words[4] = {old.x, old.y, old.z, old.w};
    bool here = false;
#pragma unroll
    for (uint32_t& word : words) {
      const bool low = (word & kExponent) == kExponent, high = (word >> 16 & kExponent) == kExponent;
      if (low) word &= 0xffff0000u;
      if (high) word &= 0xffffu;
      here |= low || high;
    }
    if (here) *piece = {words[0], words[1], words[2], words[3]};
    found |= here;
  }
  return found;
}

// Adds to each of [first, first + count) x columns the special values of the columns of what it sees in scrubbed blocks
// of `size`: value(j, c) of the other side, scrubbed(block), change(i, c, special) of the result.
template <class X, class Value, class Scrubbed, class Change>
__device__ void give_back_specials(const Band& band, int first, int count, int columns, int size, Value&& value,
                                   Scrubbed&& scrubbed, Change&& change) {
  for (int e = threadIdx.x; e < count * columns; e += blockDim.x) {
    const int i = first + e / columns, c = e % columns;
    const Range seen = band.of(i);
    X special = 0;
    for (int block = seen.begin / size * size; block < seen.end; block += size) {
      if (!scrubbed(block)) continue;
      for (int j = max(seen.begin, block); j < min(seen.end, block + size); ++j) {
        const X x = value(j, c);
        if (!isfinite(x)) special += x;
      }
    }
    if (!isfinite(special)) change(i, c, special);
  }
}

}  // namespace lcore::cuda
