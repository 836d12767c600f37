// The way back of ldmatrix.h, with the same addresses and fragments. sm_90 and later.
#pragma once

#include "cuda/ptx/shared.h"

namespace lcore::cuda {

__device__ inline void stmatrix(void* row, const uint32_t (&in)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(in[0])
               : "memory");
}

__device__ inline void stmatrix(void* row, const uint32_t (&in)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(in[0]),
               "r"(in[1])
               : "memory");
}

__device__ inline void stmatrix(void* row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

__device__ inline void stmatrix_trans(void* row, const uint32_t (&in)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(in[0])
               : "memory");
}

__device__ inline void stmatrix_trans(void* row, const uint32_t (&in)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(in[0]),
               "r"(in[1])
               : "memory");
}

__device__ inline void stmatrix_trans(void* row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

}  // namespace lcore::cuda
