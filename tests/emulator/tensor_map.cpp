#include "tensor_map.h"

#include <algorithm>
#include <cstring>

namespace lcore::emulator {
namespace {

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

}  // namespace

size_t TensorMap::box_rows() const {
  size_t rows = 1;
  for (int i = 1; i < rank; ++i) rows *= box[i];
  return rows;
}

BoxRow box_row(const TensorMap& map, const int* at, size_t number) {
  BoxRow row{number, 0, 0, map.base};
  size_t rest = number;
  for (int i = 1; i < map.rank; ++i) {
    const int64_t index = at[i] + static_cast<int64_t>(rest % map.box[i]);
    rest /= map.box[i];
    if (index < 0 || index >= map.sizes[i]) return row;
    row.global += index * map.strides[i];
  }
  const int64_t low = std::max<int64_t>(at[0], 0), high = std::min<int64_t>(at[0] + int64_t{map.box[0]}, map.sizes[0]);
  if (low >= high) return row;
  row.first = static_cast<int>(low - at[0]);
  row.count = static_cast<int>(high - low);
  row.global += low * map.element_bytes;
  return row;
}

// cuTensorMapEncodeTiled with the rules of its documentation, and one more: a swizzled box has rows as long as the
// pattern's.
CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const auto odd = [](uint64_t x) { return x % 16 != 0; };
  const auto bytes = static_cast<uint32_t>(bytes_of(type));
  bool wrong = rank < 1 || rank > kMaxRank || odd(reinterpret_cast<uintptr_t>(base)) ||
               interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
               swizzle > CU_TENSOR_MAP_SWIZZLE_128B || odd(uint64_t{box[0]} * bytes);
  for (cuuint32_t i = 0; i < rank && !wrong; ++i) {
    wrong = sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1 ||
            (i > 0 && (odd(strides[i - 1]) || strides[i - 1] >= uint64_t{1} << 40));
  }
  const auto mode = static_cast<cuda::Swizzle>(swizzle);
  if (mode != cuda::Swizzle::kNone) wrong |= box[0] * bytes != static_cast<uint32_t>(cuda::row_bytes(mode));
  if (wrong) return CUDA_ERROR_INVALID_VALUE;
  TensorMap map{};
  map.mark = kMark;
  map.type = static_cast<uint8_t>(type);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.swizzle = mode;
  map.base = static_cast<std::byte*>(base);
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.sizes[i] = static_cast<int64_t>(sizes[i]);
    map.strides[i] = i > 0 ? static_cast<int64_t>(strides[i - 1]) : bytes;
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace lcore::emulator
