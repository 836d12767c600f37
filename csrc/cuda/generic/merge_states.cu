// Merging two attention states over disjoint keys, and its gradients:
//   lse = ln(e^lse_a + e^lse_b),  out = w_a out_a + w_b out_b  with  w_x = e^(lse_x - lse);
//   dout_x = w_x dout,  dlse_x = w_x dlse +- w_a w_b dout . (out_a - out_b).
// One warp a row (batch, seq, head): it reads every operand once and writes one row, so the kernels are bound by
// memory. The state (0, -inf) is neutral on both sides, also against itself.
#include "core/merge_states.h"

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kWarpsABlock = 8;  // 256 threads: eight blocks fill an SM's 2048

template <class X>
struct Weights {
  X a, b, lse;
};

template <class X>
__device__ Weights<X> weigh(X lse_a, X lse_b) {
  const X top = isnan(lse_a) || lse_a > lse_b ? lse_a : lse_b;  // NaN wins
  if (top == -INFINITY) return {X{0}, X{0}, top};
  // An infinite lse takes everything; two of them share it.
  const X a = lse_a == top ? X{1} : exp(lse_a - top);
  const X b = lse_b == top ? X{1} : exp(lse_b - top);
  const X scale = X{1} / (a + b);
  return {a * scale, b * scale, top + log(a + b)};
}

// f(row, place of its lse, lane): warps stride over the rows, so a grid of 65535 blocks serves any number of them.
template <class F>
__device__ void for_each_row(const MergeParams& p, F&& f) {
  const int64_t rows = p.batch * p.seq * p.heads;
  const int64_t stride = int64_t{gridDim.x} * kWarpsABlock;
  for (int64_t row = int64_t{blockIdx.x} * kWarpsABlock + threadIdx.x / kWarpLanes; row < rows; row += stride) {
    const int64_t head = row % p.heads, seq = row / p.heads % p.seq, batch = row / p.heads / p.seq;
    f(row, (batch * p.heads + head) * p.seq + seq, static_cast<int>(threadIdx.x % kWarpLanes));
  }
}

template <class T>
__device__ const T* row_of(const void* data, const MergeParams& p, int64_t row) {
  return static_cast<const T*>(data) + row * p.head_dim;
}
template <class T>
__device__ T* row_of(void* data, const MergeParams& p, int64_t row) {
  return static_cast<T*>(data) + row * p.head_dim;
}

template <class T>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) merge_states_kernel(MergeParams p) {
  using X = Wide<T>;
  for_each_row(p, [&](int64_t row, int64_t i, int lane) {
    const Weights<X> w = weigh(static_cast<const X*>(p.lse_a)[i], static_cast<const X*>(p.lse_b)[i]);
    const T *a = row_of<T>(p.out_a, p, row), *b = row_of<T>(p.out_b, p, row);
    T* out = row_of<T>(p.out, p, row);
    for (int64_t c = lane; c < p.head_dim; c += kWarpLanes) out[c] = narrow<T>(widen(a[c]) * w.a + widen(b[c]) * w.b);
    if (lane == 0) static_cast<X*>(p.lse)[i] = w.lse;
  });
}

template <class T>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) merge_states_backward_kernel(MergeGradParams g) {
  using X = Wide<T>;
  const MergeParams& p = g.forward;
  for_each_row(p, [&](int64_t row, int64_t i, int lane) {
    const Weights<X> w = weigh(static_cast<const X*>(p.lse_a)[i], static_cast<const X*>(p.lse_b)[i]);
    const T *dout = row_of<T>(g.dout, p, row), *a = row_of<T>(p.out_a, p, row), *b = row_of<T>(p.out_b, p, row);
    T *dout_a = row_of<T>(g.dout_a, p, row), *dout_b = row_of<T>(g.dout_b, p, row);
    X gap = 0;
    for (int64_t c = lane; c < p.head_dim; c += kWarpLanes) {
      const X d = widen(dout[c]);
      // out_a - out = w_b (out_a - out_b): no cancellation against a rounded output.
      gap += d * (widen(a[c]) - widen(b[c]));
      dout_a[c] = narrow<T>(d * w.a);
      dout_b[c] = narrow<T>(d * w.b);
    }
    gap = reduce_add(gap);
    if (lane != 0) return;
    const X difference = w.a * w.b == X{0} ? X{0} : w.a * w.b * gap;
    const X dlse = static_cast<const X*>(g.dlse)[i];
    static_cast<X*>(g.dlse_a)[i] = difference + w.a * dlse;
    static_cast<X*>(g.dlse_b)[i] = w.b * dlse - difference;
  });
}

dim3 grid_of(const MergeParams& p) {
  const int64_t rows = p.batch * p.seq * p.heads, blocks = (rows + kWarpsABlock - 1) / kWarpsABlock;
  return dim3(static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
}

}  // namespace

void merge_states(const MergeParams& p, Stream& stream) {
  if (p.batch * p.seq * p.heads == 0) return;
  for_float_type(p.type, "merge_states", [&](auto zero) {
    launch(merge_states_kernel<decltype(zero)>, grid_of(p), dim3(kWarpLanes * kWarpsABlock), 0, stream, p);
  });
}

void merge_states_backward(const MergeGradParams& g, Stream& stream) {
  const MergeParams& p = g.forward;
  if (p.batch * p.seq * p.heads == 0) return;
  for_float_type(p.type, "merge_states", [&](auto zero) {
    launch(merge_states_backward_kernel<decltype(zero)>, grid_of(p), dim3(kWarpLanes * kWarpsABlock), 0, stream, g);
  });
}

}  // namespace lcore::cuda::generic
