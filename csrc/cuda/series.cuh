// Tensors of recurrent ops in device code: elements whose type is known at run time, and where sequences lie.
#pragma once

#include "core/sequences.h"
#include "cuda/numeric.cuh"

namespace lcore::cuda {

// f(typed pointer) for what a kernel in X may meet: double alone, or any other floating type.
template <class X, class F>
__device__ inline void with_type(const void* data, DType type, F&& f) {
  if constexpr (std::is_same_v<X, double>)
    f(static_cast<const double*>(data));
  else if (type == DType::kFloat32)
    f(static_cast<const float*>(data));
  else if (type == DType::kFloat16)
    f(static_cast<const __half*>(data));
  else
    f(static_cast<const __nv_bfloat16*>(data));
}

template <class X>
__device__ inline X read(const void* data, DType type, int64_t index) {
  X x;
  with_type<X>(data, type, [&](const auto* from) { x = widen(from[index]); });
  return x;
}

template <class X>
__device__ inline void write(void* data, DType type, int64_t index, X x) {
  with_type<X>(data, type, [&](const auto* typed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
    const_cast<T*>(typed)[index] = narrow<T>(x);
  });
}

template <class X>
__device__ inline void write(const Series& s, int64_t index, X x) {
  write<X>(const_cast<void*>(s.data), s.type, index, x);
}

__host__ __device__ inline int64_t index_of(const Series& s, int64_t batch, int64_t channel, int64_t step) {
  return batch * s.batch + channel * s.channel + step * s.step;
}

// Steps [begin, end) of a row.
struct Span {
  int64_t row, begin, end;
};

// Offsets that lie outside the row, which the host cannot see, are taken for its end.
__device__ inline Span span_of(const Sequences& s, int64_t sequence) {
  if (s.offsets == nullptr) return {sequence, 0, s.steps};
  const int64_t begin = s.offsets[sequence], end = s.offsets[sequence + 1];
  const int64_t first = begin < 0 ? 0 : begin < s.steps ? begin : s.steps;
  return {0, first, end < first ? first : end < s.steps ? end : s.steps};
}

// The last sequence that begins at or before a step.
__device__ inline int64_t sequence_at(const Sequences& s, int64_t row, int64_t step) {
  if (s.offsets == nullptr) return row;
  int64_t first = 0, last = s.count;
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    if (s.offsets[middle] <= step)
      first = middle;
    else
      last = middle;
  }
  return first;
}

// The slot of a sequence's state; negative: it is left out.
__device__ inline int64_t slot_of(const States& s, int64_t sequence) {
  return s.slots == nullptr ? sequence : s.slots[sequence];
}

inline int64_t blocks_for(int64_t items, int64_t a_block) { return (items + a_block - 1) / a_block; }

}  // namespace lcore::cuda
