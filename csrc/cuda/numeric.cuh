// Element types in registers: what memory holds in two bytes is computed with as float, double stays double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/dtype.h"

namespace lcore::cuda {

constexpr int kWarpLanes = 32;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The type that T is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ inline T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// f(T{}) for the element type of this code, which must be a floating one.
template <class F>
void for_float_type(DType type, const char* op, F&& f) {
  switch (type) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      throw std::runtime_error(std::string("lcore.") + op + ": no CUDA kernel for element type code " +
                               std::to_string(static_cast<int>(type)));
  }
}

}  // namespace lcore::cuda
