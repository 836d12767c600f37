// The products of the kernels without tensor cores, in float or double: 64 rows of one side against 64 of the other, by
// 256 threads of 4 x 4 sums. Operands pass through shared memory 16 columns, or 16 rows, at a time, transposed so that
// a thread reads four neighbours at once; as they pass, they are widened and scrubbed.
#pragma once

#include "cuda/generic/attention/poison.cuh"
#include "cuda/generic/attention/sequence.cuh"
#include "cuda/numeric.cuh"

namespace lcore::cuda {

constexpr int kFmaThreads = 256;
constexpr int kFmaTile = 64;
constexpr int kFmaDepth = 16;  // 2 x 16 x 68 and 2 weights of 64 x 68 doubles are 87 KB, 12 short of the smallest chip
constexpr int kFmaColumns = 128;  // of results a block: 4 x 8 a thread
constexpr int kFmaPitch = kFmaTile + 4;
constexpr int kFmaColumnPitch = kFmaColumns + 4;
constexpr int kFmaOperands = 2 * kFmaDepth * kFmaPitch;  // elements
constexpr int kFmaWeights = kFmaTile * kFmaPitch;

// Rows of one head of one sequence, of any type.
template <class X>
struct Cells {
  const void* data;
  DType type;
  int64_t begin;
  int64_t stride;
  int64_t dim_stride;

  __device__ X at(int row, int column) const {
    const int64_t i = begin + row * stride + column * dim_stride;
    if constexpr (std::is_same_v<X, double>) {
      return static_cast<const double*>(data)[i];
    } else {
      if (type == DType::kFloat32) return static_cast<const float*>(data)[i];
      if (type == DType::kFloat16) return widen(static_cast<const __half*>(data)[i]);
      return widen(static_cast<const __nv_bfloat16*>(data)[i]);
    }
  }
};

template <class X>
__device__ Cells<X> cells_of(const Strided& x, DType type, const Sequence& s, int head, int64_t first) {
  return {x.data, type, s.batch * x.batch + head * x.head + first * x.seq, x.seq, x.dim};
}

template <class X>
__device__ void store_cell(void* data, DType type, int64_t i, X x) {
  if constexpr (std::is_same_v<X, double>) {
    static_cast<double*>(data)[i] = x;
  } else {
    if (type == DType::kFloat32)
      static_cast<float*>(data)[i] = x;
    else if (type == DType::kFloat16)
      static_cast<__half*>(data)[i] = narrow<__half>(x);
    else
      static_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(x);
  }
}

template <class X>
__device__ void load4(X* to, const X* from) {
  if constexpr (std::is_same_v<X, float>) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    const double2 x = reinterpret_cast<const double2*>(from)[0], y = reinterpret_cast<const double2*>(from)[1];
    to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
  }
}

// A thread's rows are 4 y .. 4 y + 3, its columns of a product of rows 4 x .. 4 x + 3.
struct FmaPlace {
  int x;
  int y;
  __device__ FmaPlace() : x(threadIdx.x % 16), y(threadIdx.x / 16) {}
};

// sums = A B^T over `depth` columns, of a_count rows of A from a_first and b_count of B; zeros stand behind them.
template <class X>
__device__ void multiply_rows(X (&sums)[4][4], const Cells<X>& a, int a_first, int a_count, const Cells<X>& b,
                              int b_first, int b_count, int depth, X* memory) {
  X *const as = memory, *const bs = memory + kFmaDepth * kFmaPitch;
  const FmaPlace place;
  for (X(&row)[4] : sums) {
    for (X& sum : row) sum = 0;
  }
  for (int d = 0; d < depth; d += kFmaDepth) {
    __syncthreads();
    for (int e = threadIdx.x; e < kFmaTile * kFmaDepth; e += kFmaThreads) {
      const int k = e % kFmaDepth, row = e / kFmaDepth;
      as[k * kFmaPitch + row] = row < a_count && d + k < depth ? a.at(a_first + row, d + k) : X{0};
      bs[k * kFmaPitch + row] = row < b_count && d + k < depth ? b.at(b_first + row, d + k) : X{0};
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFmaDepth; ++k) {
      X x[4], y[4];
      load4(x, bs + k * kFmaPitch + 4 * place.x);
      load4(y, as + k * kFmaPitch + 4 * place.y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += y[i] * x[j];
      }
    }
  }
}

// A thread's sums or weights, 4 rows x 4 columns, as [column][row]: steps of the next product.
template <class X>
__device__ void store_weights(X* weights, const X (&values)[4][4]) {
  const FmaPlace place;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[(4 * place.x + j) * kFmaPitch + 4 * place.y + i] = values[i][j];
  }
}

// Column c of a thread's eight among a block's kFmaColumns.
__device__ inline int fma_column(const FmaPlace& place, int c) {
  return c / 4 * (kFmaColumns / 2) + 4 * place.x + c % 4;
}

// sums += W^T B: W's 64 steps in shared memory, B's steps are b_count rows from b_first, columns from `column` on,
// `dim` in all. With `scrubs`, NaN and infinity of B count as 0; returns whether this thread met any.
template <class X>
__device__ bool add_product(X (&sums)[4][8], const X* weights, const Cells<X>& b, int b_first, int b_count, int column,
                            int dim, bool scrubs, X* memory) {
  const FmaPlace place;
  bool found = false;
  for (int step = 0; step < b_count; step += kFmaDepth) {
    __syncthreads();
    for (int e = threadIdx.x; e < kFmaDepth * kFmaColumns; e += kFmaThreads) {
      const int k = e / kFmaColumns, c = e % kFmaColumns;
      X x = step + k < b_count && column + c < dim ? b.at(b_first + step + k, column + c) : X{0};
      if (scrubs && !isfinite(x)) {
        x = 0;
        found = true;
      }
      memory[k * kFmaColumnPitch + c] = x;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFmaDepth; ++k) {
      X x[8], y[4];
      load4(x, memory + k * kFmaColumnPitch + 4 * place.x);
      load4(x + 4, memory + k * kFmaColumnPitch + kFmaColumns / 2 + 4 * place.x);
      load4(y, weights + (step + k) * kFmaPitch + 4 * place.y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[i][c] += y[i] * x[c];
      }
    }
  }
  return found;
}

// The blocks of columns that `dim` values take: blockIdx.z.
inline unsigned fma_column_blocks(int dim) {
  return static_cast<unsigned>(std::max((dim + kFmaColumns - 1) / kFmaColumns, 1));
}

}  // namespace lcore::cuda
