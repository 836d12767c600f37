// Integer codes of a page as fragments of mma.sync, and 16-bit pairs in registers. A lane needs four neighbours of 16
// along the summed dimension, which stand in one word (core/page_format.h): shifted and masked they are two registers.
// Codes become bfloat16 minus their centre, exactly: 0x4300 with 7 bits of a code below is 128 + code.
#pragma once

#include "core/page_format.h"
#include "cuda/packs.cuh"
#include "cuda/ptx/mma.h"

namespace lcore::cuda::generic {

template <class To, class From>
__device__ inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

template <class T>
__device__ inline uint32_t pair_of(T low, T high) {
  return bits_as<unsigned short>(low) | static_cast<uint32_t>(bits_as<unsigned short>(high)) << 16;
}
template <class T>
__device__ inline uint32_t pair_of(float low, float high) {
  if constexpr (std::is_same_v<T, __half>)
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  else
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
template <class T>
__device__ inline float2 values_of(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(bits_as<__half2>(pair));
  else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ inline float2 halves_at(const __half* p) { return values_of<__half>(*reinterpret_cast<const uint32_t*>(p)); }

template <class T>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    mma_m16n8k16_fp16(d, a, b);
  else
    mma_m16n8k16_bf16(d, a, b);
}

// What is taken off a code.
__device__ inline float centre_of(PageFormat format) { return static_cast<float>(1 << (bits_of(format) - 1)); }

// Where four codes from `index`, a multiple of 4, on stand: a row of words, and bits of a word.
struct CodePlace {
  int row;
  int shift;

  __device__ CodePlace(PageFormat format, int index) {
    const int codes = 2 * planes_of(format);  // of a word
    row = index / codes;
    shift = bits_of(format) * (index % codes / 2);
  }
};

__device__ inline uint32_t minus(uint32_t x, uint32_t y) {
  return bits_as<uint32_t>(__hsub2(bits_as<__nv_bfloat162>(x), bits_as<__nv_bfloat162>(y)));
}

// The lowest two pairs of a shifted word, as bfloat16.
__device__ inline void code_pairs(PageFormat format, uint32_t word, uint32_t (&pairs)[2]) {
  constexpr uint32_t kBase = 0x43004300u;  // 128, twice
  if (format == PageFormat::kInt8) {       // signed: bit 7 makes the 128 that is taken off a 256
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t codes = word >> (8 * i);
      pairs[i] = minus((codes & 0x007f007fu) | kBase, (codes & 0x00800080u) | kBase);
    }
  } else if (format == PageFormat::kInt4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i] = minus((word >> (4 * i) & 0x000f000fu) | kBase, 0x43084308u);  // 136
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs[i] = minus((word >> (2 * i) & 0x00030003u) | kBase, 0x43024302u);  // 130
  }
}

}  // namespace lcore::cuda::generic
