// The arguments of a rotation, checked and as kernels see them.
#pragma once

#include "core/rotation.h"
#include "torch/library.h"

namespace lcore {

// inv_freq (rotary_dim / 2) float32 or float64, contiguous; it must outlive the result.
Rotation rotation_of(const char* op, const Tensor& inv_freq, double attention_scaling, bool interleaved,
                     int64_t head_dim);

}  // namespace lcore
