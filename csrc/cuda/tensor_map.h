// Tensor maps: how the copy engine (cuda/ptx/tma.h) sees a tensor in global memory. Made on the host, handed to the
// kernel inside its Params, which it then takes as `const __grid_constant__ Params`.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "cuda/swizzle.h"

namespace lcore::cuda {

inline CUtensorMapDataType tensor_map_type(DType type) {
  switch (type) {
    case DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::kFloat64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kInt32:
      return CU_TENSOR_MAP_DATA_TYPE_INT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_INT64;
  }
}

// The driver's cuTensorMapEncodeTiled, found without linking the driver.
inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const auto status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("lcore: the GPU's driver has no cuTensorMapEncodeTiled: CUDA 12 or later is needed");
    }
    return reinterpret_cast<Encoder>(found);
  }();
  return encoder;
}

// Dimensions from the innermost, which is contiguous, outwards. strides: elements from one index of the dimensions 1,
// 2,
// ... to the next; in bytes they are multiples of 16, and `base` is aligned to 16. A box, of at most 256 indices a
// dimension, is what one copy moves; its rows are contiguous in shared memory and as long as the swizzle's. What lies
// outside the tensor is read as zero and not written.
template <int kRank>
CUtensorMap tensor_map(CUtensorMapDataType type, size_t element_bytes, const void* base, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank], Swizzle swizzle) {
  cuuint64_t global_sizes[kRank], byte_strides[kRank - 1];
  cuuint32_t box_sizes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    global_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    box_sizes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) byte_strides[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * element_bytes;
  }
  CUtensorMap map;
  const CUresult status =
      tensor_map_encoder()(&map, type, kRank, const_cast<void*>(base), global_sizes, byte_strides, box_sizes, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return map;
  std::string words =
      "lcore: the driver refuses a tensor map (error " + std::to_string(status) + ") of sizes, strides, box:";
  for (int i = 0; i < kRank; ++i) {
    words += " " + std::to_string(sizes[i]) + "/" + (i > 0 ? std::to_string(strides[i - 1]) : "1") + "/" +
             std::to_string(box[i]);
  }
  throw std::runtime_error(words);
}

template <int kRank>
CUtensorMap tensor_map(DType type, const void* base, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                       const int (&box)[kRank], Swizzle swizzle) {
  return tensor_map(tensor_map_type(type), size_of(type), base, sizes, strides, box, swizzle);
}

}  // namespace lcore::cuda
