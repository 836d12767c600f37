// Tensor maps as the emulator encodes them into the 128 bytes that are the driver's secret.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "cuda/swizzle.h"

namespace lcore::emulator {

constexpr int kMaxRank = 5;

struct TensorMap {
  uint32_t mark;  // kMark
  uint8_t type;   // CUtensorMapDataType
  uint8_t rank, element_bytes;
  cuda::Swizzle swizzle;
  std::byte* base;
  int64_t sizes[kMaxRank];
  int64_t strides[kMaxRank];  // in bytes
  uint16_t box[kMaxRank];

  size_t box_rows() const;
  size_t box_bytes() const { return box_rows() * box[0] * element_bytes; }
};
constexpr uint32_t kMark = 0x7e4503a9;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// A row of a box that lies in the tensor at least in part.
struct BoxRow {
  size_t number;      // in the box
  int first, count;   // elements of the row that lie in the tensor
  std::byte* global;  // the first of them
};

// The next row from `number` on; count 0 when it lies outside.
BoxRow box_row(const TensorMap& map, const int* at, size_t number);

}  // namespace lcore::emulator
