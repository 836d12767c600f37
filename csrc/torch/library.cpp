#include "torch/library.h"

#include "torch/device.h"

namespace lcore {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      STD_TORCH_CHECK(false,
                      "lcore: a tensor's dtype must be float32, float64, float16, bfloat16, int32 or int64, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

PageFormat format_of(const std::string& name) {
  constexpr std::pair<const char*, PageFormat> kFormats[] = {
      {"fp32", PageFormat::kFloat32}, {"fp16", PageFormat::kFloat16}, {"bf16", PageFormat::kBFloat16},
      {"fp8", PageFormat::kFloat8},   {"int8", PageFormat::kInt8},    {"int4", PageFormat::kInt4},
      {"int2", PageFormat::kInt2}};
  for (const auto& [known, format] : kFormats) {
    if (name == known) return format;
  }
  STD_TORCH_CHECK(false, "lcore: a page format must be fp32, fp16, bf16, fp8, int8, int4 or int2, got ", name);
}

Strided strided(const Tensor& tensor) {
  const auto strides = tensor.strides();
  if (tensor.dim() == 3) return {tensor.data_ptr(), 0, strides[0], strides[1], strides[2]};
  return {tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, std::optional<ScalarType> type) {
  return poisoned(torch::stable::new_empty(like, shape, type));
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

}  // namespace lcore
