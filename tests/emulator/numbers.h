// The numbers of tensor cores: how `bits`, shifted down to an element, are a number.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <bit>
#include <cstdint>

namespace lcore::emulator {

struct Bf16 {
  static constexpr int kElements = 2;  // in 32 bits
  static float value(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
};
struct Fp16 {
  static constexpr int kElements = 2;
  static float value(uint32_t bits) { return __half2float(__half(__half_raw{static_cast<uint16_t>(bits)})); }
};
struct Tf32 {
  static constexpr int kElements = 1;
  static float value(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
};
struct S8 {
  static constexpr int kElements = 4;
  static int32_t value(uint32_t bits) { return static_cast<int8_t>(bits); }
};
struct E4m3 {
  static constexpr int kElements = 4;
  static float value(uint32_t bits) {
    __nv_fp8_e4m3 x;
    x.__x = static_cast<__nv_fp8_storage_t>(bits);
    return static_cast<float>(x);
  }
};

}  // namespace lcore::emulator
