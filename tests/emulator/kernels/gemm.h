// c = a b by one warp a tile of 16 x 8, straight through the wrappers of ptx/. Tests only.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "entry.h"

struct Gemm {
  const void* a;  // (m, k)
  const void* b;  // (k, n) where the kernel loads by ldmatrix, (n, k) where it loads words
  void* c;        // (m, n), float or int32
  int m, n, k;    // multiples of 16, 8, and of the depth of the instruction
};

// Deals a warp's tile out to c; `block` of the grid (n / 8, m / 16).
template <class Sum>
__device__ void store_tile(const Gemm& p, const Sum (&d)[4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * blockIdx.y + lane / 4 + 8 * (i / 2), column = 8 * blockIdx.x + 2 * (lane % 4) + i % 2;
    static_cast<Sum*>(p.c)[row * p.n + column] = d[i];
  }
}

// Both operands by 32-bit words from global memory, each of which holds the elements of one register.
template <class Sum, void (*kMma)(Sum (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]), int kElements>
__global__ void gemm_words(Gemm p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4, words = p.k / kElements;
  const uint32_t* a_rows = static_cast<const uint32_t*>(p.a) + 16 * blockIdx.y * words;
  const uint32_t* b_rows = static_cast<const uint32_t*>(p.b) + 8 * blockIdx.x * words;
  Sum d[4] = {};
  for (int k = 0; k < words; k += 8) {
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r) a[r] = a_rows[(g + 8 * (r % 2)) * words + k + t + 4 * (r / 2)];
    for (int r = 0; r < 2; ++r) b[r] = b_rows[g * words + k + t + 4 * r];
    kMma(d, a, b);
  }
  store_tile(p, d);
}

inline void launch_gemm(void (*kernel)(Gemm), const Gemm& p) {
  lcore::cuda::launch(kernel, dim3(p.n / 8, p.m / 16), dim3(32), 0, lcore::emulator::no_stream(), p);
}
