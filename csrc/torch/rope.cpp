// lcore::rope.
#include "core/rope.h"

#include "torch/device.h"
#include "torch/rope.h"

namespace lcore {

Rotation rotation_of(const char* op, const Tensor& inv_freq, double attention_scaling, bool interleaved,
                     int64_t head_dim) {
  require(inv_freq.dim() == 1 && inv_freq.is_contiguous() && 2 * inv_freq.size(0) <= head_dim, op,
          "inv_freq must be contiguous with at most head_dim / 2 entries, got " + shape_text(inv_freq));
  const DType type = dtype_of(inv_freq);
  require(type == DType::kFloat32 || type == DType::kFloat64, op, "inv_freq must be float32 or float64");
  return {inv_freq.data_ptr(), type, static_cast<int>(inv_freq.size(0)), attention_scaling, interleaved};
}

namespace {

Tensor rope(Tensor x, Tensor positions, Tensor inv_freq, double attention_scaling, bool interleaved, bool inverse) {
  const char* op = "rope";
  const int64_t rank = x.dim();
  require(rank == 3 || rank == 4, op, "x must have 3 or 4 dimensions, got " + shape_text(x));
  RopeParams p{};
  p.type = dtype_of(x);
  p.x = strided(x);
  p.batch = rank == 4 ? x.size(0) : 1;
  p.seq = x.size(rank - 3);
  p.heads = x.size(rank - 2);
  p.head_dim = static_cast<int>(x.size(rank - 1));
  p.rotation = rotation_of(op, inv_freq, attention_scaling, interleaved, x.size(rank - 1));
  const bool shared = positions.dim() == 1;
  require(positions.size(positions.dim() - 1) == p.seq && (shared || (positions.dim() == 2 && rank == 4)) &&
              (shared || positions.size(0) == p.batch),
          op, "positions must have shape (seq,) or (batch, seq), got " + shape_text(positions));
  p.positions = positions.data_ptr();
  p.positions_type = dtype_of(positions);
  p.positions_batch = shared ? 0 : positions.stride(0);
  p.positions_seq = positions.stride(positions.dim() - 1);
  require(p.positions_type != DType::kFloat16 && p.positions_type != DType::kBFloat16, op,
          "positions must be int32, int64, float32 or float64");
  p.inverse = inverse;
  Tensor out = new_tensor(x, {x.sizes().begin(), x.sizes().end()});
  p.out = out.data_ptr();
  LCORE_RUN(rope, x, p)
  return out;
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "rope(Tensor x, Tensor positions, Tensor inv_freq, float attention_scaling=1.0, bool interleaved=False,"
      " bool inverse=False) -> Tensor");
}

LCORE_KERNELS(m) { m.impl<lcore::rope>("rope"); }
