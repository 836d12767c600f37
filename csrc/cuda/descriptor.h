// The 64-bit words by which wgmma (cuda/ptx/wgmma.h) finds an operand in shared memory. An operand has the index that
// the product keeps, m or n, and the index k that it sums over; a step of the instruction takes 32 bytes of k.
#pragma once

#include "cuda/ptx/shared.h"
#include "cuda/swizzle.h"

namespace lcore::cuda {

// Which index is contiguous in shared memory. Only 16-bit types may have m or n so.
enum class Major : int { kK, kMn };

// Bits 0, 16 and 32: address and both offsets over 16. Bit 62: 1, 2, 3 for rows of 128, 64, 32 bytes.
__device__ inline uint64_t descriptor(const void* tile, Swizzle swizzle, int leading_bytes, int stride_bytes) {
  const auto in_sixteens = [](uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  const uint64_t layout = (4 - static_cast<uint64_t>(swizzle)) % 4;
  return in_sixteens(shared_address(tile)) | in_sixteens(leading_bytes) << 16 | in_sixteens(stride_bytes) << 32 |
         layout << 62;
}

// A swizzled panel whose rows are an index m or n and hold row_bytes(swizzle) of k: the first rows of a tile that
// tma_load brought. Steps of k lie 32 bytes apart.
__device__ inline uint64_t k_major(const void* panel, Swizzle swizzle) {
  return descriptor(panel, swizzle, 16, repeat_bytes(swizzle));
}

// Swizzled panels whose rows are an index k and hold row_bytes(swizzle) of m or n; the next panel, with the next m or
// n, lies panel_bytes further. A step of k is as many rows further as k has elements in 32 bytes.
__device__ inline uint64_t mn_major(const void* panel, Swizzle swizzle, int panel_bytes) {
  return descriptor(panel, swizzle, panel_bytes, repeat_bytes(swizzle));
}

// The same operand `bytes`, a multiple of 16, further on: inside a row, or at the beginning of another group of eight.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace lcore::cuda
