#include "torch/recurrent.h"

#include <algorithm>

#include "torch/device.h"

namespace lcore {

using torch::headeronly::ScalarType;

Series series(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  return {tensor.data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(rank - 2), tensor.stride(rank - 1)};
}

Series series(const OptionalTensor& tensor) { return tensor.has_value() ? series(*tensor) : Series{}; }

Sequences sequences(const char* op, const OptionalTensor& cu_seqlens, int64_t batch, int64_t steps) {
  if (!cu_seqlens.has_value()) return {batch, steps, nullptr, batch};
  const Tensor& cu = *cu_seqlens;
  require(batch == 1, op, "batch must be 1 with cu_seqlens, got " + std::to_string(batch));
  require(cu.is_contiguous() && cu.scalar_type() == ScalarType::Int && cu.dim() == 1 && cu.size(0) > 0, op,
          "cu_seqlens must be contiguous int32 of shape (sequences + 1,)");
  const auto* offsets = static_cast<const int32_t*>(cu.data_ptr());
  const int64_t count = cu.size(0) - 1;
  if (on_gpu(cu)) return {1, steps, offsets, count};
  bool valid = offsets[0] == 0 && offsets[count] <= steps;
  for (int64_t i = 0; i < count; ++i) valid = valid && offsets[i] <= offsets[i + 1];
  require(valid, op, "cu_seqlens must rise from 0 to at most " + std::to_string(steps) + " steps");
  return {1, steps, offsets, count};
}

Tensor empty_as(const Tensor& x) { return poisoned(torch::stable::empty_like(x)); }

void zero_unused(const Sequences& s, Tensor& tensor) {
  if (s.offsets != nullptr && (on_gpu(tensor) || s.offsets[s.count] < s.steps)) torch::stable::zero_(tensor);
}

ScalarType wide_type(const Tensor& activation) {
  return activation.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void require_float(const char* op, const char* name, const Tensor& tensor, const Tensor& u) {
  const ScalarType type = tensor.scalar_type();
  const bool known = type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
                     type == ScalarType::BFloat16;
  require(known && (type == ScalarType::Double) == (u.scalar_type() == ScalarType::Double), op,
          std::string(name) + " must be float32, float16 or bfloat16, or float64 where u is");
}

void require_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  require(std::equal(tensor.sizes().begin(), tensor.sizes().end(), shape.begin(), shape.end()), op,
          std::string(name) + " must have shape " + text + "), got " + shape_text(tensor));
}

void require_dense(const char* op, const char* name, const OptionalTensor& tensor, ScalarType type,
                   const std::vector<int64_t>& shape) {
  if (!tensor.has_value()) return;
  require_shape(op, name, *tensor, shape);
  require(tensor->is_contiguous() && tensor->scalar_type() == type, op,
          std::string(name) + " must be contiguous " + torch::headeronly::toString(type));
}

const int64_t* state_slots(const char* op, const OptionalTensor& state_indices, int64_t count, int64_t slots) {
  if (!state_indices.has_value()) return nullptr;
  require_dense(op, "state_indices", state_indices, ScalarType::Long, {count});
  const auto* values = static_cast<const int64_t*>(state_indices->data_ptr());
  if (on_gpu(*state_indices)) return values;
  std::vector<bool> taken(slots, false);
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0) continue;
    require(
        values[i] < slots && !taken[values[i]], op,
        "state_indices must be different slots below " + std::to_string(slots) + ", got " + std::to_string(values[i]));
    taken[values[i]] = true;
  }
  return values;
}

}  // namespace lcore
