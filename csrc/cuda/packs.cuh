// Rows of elements between memory and registers, 16 bytes at a time where they are aligned to that.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/attention.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda {

constexpr int kPackBytes = 16;

// Elements of T that one load or store moves.
template <class T>
constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));

// Whether packs from the start of every row are aligned.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0; }
inline bool is_aligned(const Strided& x, DType type) {
  const auto whole = [&](int64_t stride) { return stride * static_cast<int64_t>(size_of(type)) % kPackBytes == 0; };
  return is_aligned(x.data) && x.dim == 1 && whole(x.batch) && whole(x.seq) && whole(x.head);
}

// out[i] = from[i stride]; `packed`: the stride is 1 and `from` is aligned.
template <int kCount, class T>
__device__ inline void load_row(const T* from, int64_t stride, bool packed, Wide<T> (&out)[kCount]) {
  if constexpr (kCount % kPack<T> == 0) {
    if (packed) {
#pragma unroll
      for (int begin = 0; begin < kCount; begin += kPack<T>) {
        const uint4 bits = *reinterpret_cast<const uint4*>(from + begin);
        T values[kPack<T>];
        memcpy(static_cast<void*>(values), &bits, sizeof(bits));
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) out[begin + i] = widen(values[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = widen(from[i * stride]);
}

// to[i] = in[i], contiguous; `packed`: `to` is aligned.
template <int kCount, class T>
__device__ inline void store_row(T* to, bool packed, const Wide<T> (&in)[kCount]) {
  if constexpr (kCount % kPack<T> == 0) {
    if (packed) {
#pragma unroll
      for (int begin = 0; begin < kCount; begin += kPack<T>) {
        T values[kPack<T>];
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) values[i] = narrow<T>(in[begin + i]);
        uint4 bits;
        memcpy(&bits, static_cast<const void*>(values), sizeof(bits));
        *reinterpret_cast<uint4*>(to + begin) = bits;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = narrow<T>(in[i]);
}

}  // namespace lcore::cuda
