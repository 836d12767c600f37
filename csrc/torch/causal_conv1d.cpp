// lcore::causal_conv1d, its backward and lcore::causal_conv1d_update.
#include "core/causal_conv1d.h"

#include "torch/device.h"
#include "torch/recurrent.h"

namespace lcore {
namespace {

using torch::headeronly::ScalarType;

CausalConv1dParams conv_params(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               bool silu, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  require(x.dim() == 3, op, "x must have 3 dimensions, got " + shape_text(x));
  require_float(op, "x", x, x);
  CausalConv1dParams p{};
  const ScalarType wide = wide_type(x);
  const int64_t dim = x.size(1), width = weight.dim() == 2 ? weight.size(1) : 0;
  require(width >= 1 && width <= kMaxConvWidth, op, "weight must have shape (dim, width), width 1 to 8");
  require_dense(op, "weight", weight, wide, {dim, width});
  require_dense(op, "bias", bias, wide, {dim});
  p.sequences = sequences(op, cu_seqlens, x.size(0), x.size(2));
  require_dense(op, "initial_state", initial_state, x.scalar_type(), {p.sequences.count, dim, width - 1});
  p.is_double = wide == ScalarType::Double;
  p.dim = dim;
  p.width = static_cast<int>(width);
  p.silu = silu;
  p.x = series(x);
  p.weight = weight.data_ptr();
  p.bias = data_or_null(bias);
  p.initial = {data_or_null(initial_state), dtype_of(x), nullptr};
  return p;
}

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, OptionalTensor bias, bool silu,
                                         OptionalTensor initial_state, OptionalTensor cu_seqlens) {
  CausalConv1dParams p = conv_params("causal_conv1d", x, weight, bias, silu, initial_state, cu_seqlens);
  Tensor out = empty_as(x);
  Tensor final_state = new_tensor(x, {p.sequences.count, p.dim, p.width - 1});
  zero_unused(p.sequences, out);
  p.out = series(out);
  p.final = {final_state.data_ptr(), dtype_of(x), nullptr};
  LCORE_RUN(causal_conv1d, x, p)
  return {out, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor dout, OptionalTensor dfinal, Tensor x,
                                                                  Tensor weight, OptionalTensor bias, bool silu,
                                                                  OptionalTensor initial_state,
                                                                  OptionalTensor cu_seqlens) {
  const char* op = "causal_conv1d_backward";
  CausalConv1dGradParams g{};
  g.forward = conv_params(op, x, weight, bias, silu, initial_state, cu_seqlens);
  const CausalConv1dParams& p = g.forward;
  require(dout.scalar_type() == x.scalar_type(), op, "dout must have x's dtype");
  require_shape(op, "dout", dout, {x.size(0), x.size(1), x.size(2)});
  require_dense(op, "dfinal", dfinal, x.scalar_type(), {p.sequences.count, p.dim, p.width - 1});
  Tensor dx = empty_as(x), dweight = new_tensor(weight, {p.dim, p.width});
  Tensor dbias = new_tensor(weight, {bias.has_value() ? p.dim : 0});
  Tensor dinitial = new_tensor(x, {initial_state.has_value() ? p.sequences.count : 0, p.dim, p.width - 1});
  zero_unused(p.sequences, dx);
  g.dout = series(dout);
  g.dfinal = {data_or_null(dfinal), dtype_of(x), nullptr};
  g.dx = series(dx);
  g.dinitial = {initial_state.has_value() ? dinitial.data_ptr() : nullptr, dtype_of(x), nullptr};
  g.dweight = dweight.data_ptr();
  g.dbias = bias.has_value() ? dbias.data_ptr() : nullptr;
  LCORE_RUN(causal_conv1d_backward, x, g)
  return {dx, dweight, dbias, dinitial};
}

// The next steps of every row; its state holds the width - 1 before them and is moved on in place.
Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, OptionalTensor bias, bool silu,
                            OptionalTensor state_indices) {
  const char* op = "causal_conv1d_update";
  CausalConv1dParams p = conv_params(op, x, weight, bias, silu, {}, {});
  require_float(op, "state", state, x);
  require(state.is_contiguous() && state.dim() == 3 && (state_indices.has_value() || state.size(0) == x.size(0)), op,
          "state must be contiguous with a row for each of x, got " + shape_text(state));
  require_shape(op, "state", state, {state.size(0), p.dim, p.width - 1});
  p.initial = {state.data_ptr(), dtype_of(state), state_slots(op, state_indices, x.size(0), state.size(0))};
  p.final = p.initial;
  Tensor out = empty_as(x);
  if (state_indices.has_value()) torch::stable::zero_(out);
  p.out = series(out);
  LCORE_RUN(causal_conv1d, x, p)
  return out;
}

}  // namespace
}  // namespace lcore

LCORE_SCHEMAS(m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, Tensor? initial_state=None,"
      " Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, bool silu,"
      " Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, bool silu=False,"
      " Tensor? state_indices=None) -> Tensor");
}

LCORE_KERNELS(m) {
  m.impl<lcore::causal_conv1d>("causal_conv1d");
  m.impl<lcore::causal_conv1d_backward>("causal_conv1d_backward");
  m.impl<lcore::causal_conv1d_update>("causal_conv1d_update");
}
