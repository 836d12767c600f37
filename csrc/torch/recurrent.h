// Tensors of recurrent ops as kernel arguments, checked.
#pragma once

#include "core/sequences.h"
#include "torch/library.h"

namespace lcore {

// (batch, channels, steps) where it lies; absent where there is no tensor.
Series series(const Tensor& tensor);
Series series(const OptionalTensor& tensor);

// The rows of a batch, or one row packed by cu_seqlens.
Sequences sequences(const char* op, const OptionalTensor& cu_seqlens, int64_t batch, int64_t steps);

// New memory with x's shape, dtype and, where it is dense, strides.
Tensor empty_as(const Tensor& x);

// Sets what no sequence of a packed row covers to zero.
void zero_unused(const Sequences& s, Tensor& tensor);

// float32, or float64 for float64 activations.
torch::headeronly::ScalarType wide_type(const Tensor& activation);

// A floating-point dtype that may stand beside x: float64 only with float64.
void require_float(const char* op, const char* name, const Tensor& tensor, const Tensor& x);
void require_shape(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape);
// Contiguous, of the given type and shape.
void require_dense(const char* op, const char* name, const OptionalTensor& tensor, torch::headeronly::ScalarType type,
                   const std::vector<int64_t>& shape);

// For each of `count` rows its slot among `slots` states, each taken once; negative: none. nullptr where there is no
// tensor.
const int64_t* state_slots(const char* op, const OptionalTensor& state_indices, int64_t count, int64_t slots);

inline void* data_or_null(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

}  // namespace lcore
