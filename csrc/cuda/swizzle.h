// How the copy engine and the tensor cores mix 16-byte chunks of shared memory, so that a column of chunks lies in many
// banks: rows of 32, 64 or 128 bytes, back to back, in groups of eight whose chunks are exchanged.
#pragma once

#include <cuda_runtime.h>

namespace lcore::cuda {

enum class Swizzle : int { kNone, k32, k64, k128 };  // the codes of tensor maps

// Bytes of a row; without a swizzle, those of a chunk.
__host__ __device__ constexpr int row_bytes(Swizzle swizzle) { return 16 << static_cast<int>(swizzle); }

// Bytes after which the pattern comes again: what a tile's address is aligned to.
__host__ __device__ constexpr int repeat_bytes(Swizzle swizzle) { return 8 * row_bytes(swizzle); }

// Where byte `offset` of a tile lies. Its own inverse; of an address it makes an address.
template <class Offset>
__host__ __device__ constexpr Offset swizzled(Swizzle swizzle, Offset offset) {
  return offset ^ ((offset >> 3) & static_cast<Offset>(row_bytes(swizzle) - 16));
}

}  // namespace lcore::cuda
