// The types that wgmma multiplies, and that it adds in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lcore::cuda {

enum class Product : int { kBf16, kFp16, kTf32, kE4m3, kS8 };

template <Product kType>
using SumOf = std::conditional_t<kType == Product::kS8, int32_t, float>;

}  // namespace lcore::cuda
