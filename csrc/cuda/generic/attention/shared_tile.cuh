// Tiles of 16-bit values in shared memory, as cp.async fills them and ldmatrix reads them.
#pragma once

#include <cstring>

#include "core/attention.h"
#include "cuda/generic/attention/sequence.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace lcore::cuda {

// Rows of one head of one sequence in global memory.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t dim_stride;
  bool vectors;  // 16 bytes at once

  __device__ const T* at(int row, int column) const { return data + row * stride + column * dim_stride; }
};

template <class T>
__device__ Rows<T> rows_of(const Strided& x, bool vectors, const Sequence& s, int head, int64_t first) {
  return {static_cast<const T*>(x.data) + s.batch * x.batch + head * x.head + first * x.seq, x.seq, x.dim, vectors};
}

// Whether all rows of x begin at a multiple of 16 bytes and hold whole vectors.
inline bool in_vectors(const Strided& x, int dim) {
  return x.dim == 1 && dim % 8 == 0 && x.batch % 8 == 0 && x.seq % 8 == 0 && x.head % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Where a lane's row and 16 bytes stand in a 16 x 16 fragment.
struct FragmentLanes {
  int rows;     // A by rows, and B whose steps are the tile's rows (with transpose)
  int columns;  // B whose columns are the tile's rows

  __device__ explicit FragmentLanes(int lane)
      : rows(lane % 16 * 64 + (lane / 16 ^ lane % 8) * 8),
        columns((lane % 8 + lane / 16 * 8) * 64 + (lane / 8 % 2 ^ lane % 8) * 8) {}
};

// kRows x kDim in panels of 64 columns, 128 bytes a row. The 16 bytes c of row r stand at c ^ (r % 8): the eight rows
// of a matrix of ldmatrix, and the eight pieces of a row, lie in eight different groups of banks.
template <class T, int kRows, int kDim>
struct SharedTile {
  static constexpr int kElements = kRows * kDim;
  static constexpr int kPieces = kElements / 8;
  T* data;

  __device__ T* piece(int row, int column8) const {
    return data + column8 / 8 * (kRows * 64) + row * 64 + (column8 % 8 ^ row % 8) * 8;
  }
  __device__ const T* fragment(int lane_offset, int row16, int column16) const {
    return data + column16 / 4 * (kRows * 64) + row16 * (16 * 64) + (lane_offset ^ column16 % 4 * 16);
  }
};

// Fills the tile with `rows` rows of `dim` values and zeros around them; commit and wait are the caller's.
template <int kThreads, class T, int kRows, int kDim>
__device__ void load_tile(const SharedTile<T, kRows, kDim>& to, const Rows<T>& from, int first, int rows, int dim) {
  constexpr int kRowPieces = kDim / 8;
#pragma unroll 2  // more addresses at once would take registers from the caller's sums
  for (int i = threadIdx.x; i < to.kPieces; i += kThreads) {
    const int row = i / kRowPieces, column8 = i % kRowPieces;
    T* piece = to.piece(row, column8);
    if (from.vectors) {
      const bool filled = row < rows && column8 * 8 < dim;
      cp_async<16>(piece, filled ? from.at(first + row, column8 * 8) : from.data, filled ? 16 : 0);
    } else {
#pragma unroll 1
      for (int c = 0; c < 8; ++c) {
        const int column = column8 * 8 + c;
        piece[c] = row < rows && column < dim ? *from.at(first + row, column) : narrow<T>(0.0f);
      }
    }
  }
}

template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, __half>)
    mma_m16n8k16_fp16(d, a, b);
  else
    mma_m16n8k16_bf16(d, a, b);
}

template <class T>
__device__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// Of a product's 16 x kColumns results the A fragments of the next product: a lane holds the same places.
template <class T, int kEighths>
__device__ void pack_fragments(uint32_t (&a)[kEighths / 2][4], const float (&d)[kEighths][4]) {
#pragma unroll
  for (int i = 0; i < kEighths; ++i) {
    a[i / 2][i % 2 * 2] = pack<T>(d[i][0], d[i][1]);
    a[i / 2][i % 2 * 2 + 1] = pack<T>(d[i][2], d[i][3]);
  }
}

// The warp's 16 x kDim results, times `scale` by row half, into its 16 rows of the tile, and from there to memory in
// whole vectors: rows [0, rows) of `dim` values, `stride` apart.
template <class T, int kRows, int kDim>
__device__ void store_rows(const SharedTile<T, kRows, kDim>& tile, int row16, const float (&d)[kDim / 8][4],
                           const float (&scale)[2], T* to, int64_t stride, int rows, int dim) {
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pack<T>(d[n][2 * half] * scale[half], d[n][2 * half + 1] * scale[half]);
      *reinterpret_cast<uint32_t*>(tile.piece(row16 * 16 + g + 8 * half, n) + 2 * t) = pair;
    }
  }
  __syncwarp();
  const bool vectors = dim % 8 == 0;
  for (int i = lane; i < 16 * kDim / 8; i += kWarpLanes) {
    const int row = row16 * 16 + i / (kDim / 8), column8 = i % (kDim / 8);
    if (row >= rows || column8 * 8 >= dim) continue;
    const T* piece = tile.piece(row, column8);
    T* out = to + row * stride + column8 * 8;
    if (vectors) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(piece);
    } else {
#pragma unroll 1
      for (int c = 0; c < min(8, dim - column8 * 8); ++c) out[c] = piece[c];
    }
  }
}

}  // namespace lcore::cuda
