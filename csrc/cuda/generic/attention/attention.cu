// Attention and its backward: which family of kernels runs, and what stands beside them: delta_i = dO_i . O_i - dlse_i
// before the backward, dsink_h = - sum_i e^(sink_h - lse_i) delta_i after it. delta is bound by memory: eight lanes a
// row, 16 bytes each.
#include "cuda/generic/attention/kernels.h"
#include "cuda/generic/attention/shared_tile.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kThreads = 256;
constexpr int kRowLanes = 8;

template <class T>
struct alignas(16) Vector {
  T x[16 / sizeof(T)];
};

template <class X>
struct DeltaParams {
  AttentionGradParams g;
  X* delta;
  int64_t rows;  // batch x seq_q x heads
  bool vectors;
};

template <class T>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(DeltaParams<Wide<T>> d) {
  using X = Wide<T>;
  constexpr int kVector = 16 / sizeof(T);
  const AttentionParams& p = d.g.forward;
  const int lane = threadIdx.x % kRowLanes;
  const int64_t stride = int64_t{gridDim.x} * (kThreads / kRowLanes);
  const int64_t rounds = (d.rows + stride - 1) / stride;
  for (int64_t round = 0; round < rounds; ++round) {  // as many for every lane, which all meet in the sum
    const int64_t index = round * stride + int64_t{blockIdx.x} * (kThreads / kRowLanes) + threadIdx.x / kRowLanes;
    const bool real = index < d.rows;
    const int64_t head = index % p.heads, row = index / p.heads % p.seq_q, batch = index / p.heads / p.seq_q;
    X sum = 0;
    if (real) {
      const T* out = static_cast<const T*>(p.out) + index * p.head_dim_v;
      const T* dout =
          static_cast<const T*>(d.g.dout.data) + batch * d.g.dout.batch + row * d.g.dout.seq + head * d.g.dout.head;
      for (int c = lane * kVector; c < p.head_dim_v; c += kRowLanes * kVector) {
        if (d.vectors) {
          const Vector<T> values = *reinterpret_cast<const Vector<T>*>(out + c);
          const Vector<T> dvalues = *reinterpret_cast<const Vector<T>*>(dout + c);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum += widen(values.x[i]) * widen(dvalues.x[i]);
        } else {  // in the same order
          for (int i = c; i < min(c + kVector, p.head_dim_v); ++i) sum += widen(out[i]) * widen(dout[i * d.g.dout.dim]);
        }
      }
    }
    sum = reduce_add<kRowLanes>(sum);
    if (!real || lane != 0) continue;
    const int64_t at = batch * p.lse_batch + head * p.lse_head + row;
    d.delta[at] = sum - (d.g.dlse == nullptr ? X{0} : static_cast<const X*>(d.g.dlse)[at]);
  }
}

template <class X>
struct SinkParams {
  AttentionGradParams g;
  const X* delta;
};

// A block a head; the rows' shares add up in double: float would lose what few rows add.
template <class X>
__global__ void __launch_bounds__(kThreads) attention_sinks_kernel(SinkParams<X> d) {
  const AttentionParams& p = d.g.forward;
  __shared__ double parts[kThreads / kWarpLanes];
  const int head = blockIdx.x;
  const X sink = static_cast<const X*>(p.sinks)[head];
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t seq = packed ? p.cu_seqlens_q[p.batch] : p.seq_q, rows = packed ? seq : p.batch * seq;
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    const int64_t at = row / seq * p.lse_batch + head * p.lse_head + row % seq;
    const X lse = static_cast<const X*>(p.lse)[at];
    // An infinite sink holds all the mass itself; a sink of -inf holds none, also where nothing else stands.
    const X weight = sink == -INFINITY ? X{0} : sink == lse ? X{1} : exp(sink - lse);
    sum -= static_cast<double>(weight) * d.delta[at];
  }
  sum = reduce_add(sum);
  if (threadIdx.x % kWarpLanes == 0) parts[threadIdx.x / kWarpLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarpLanes; ++i) sum += parts[i];
  static_cast<X*>(d.g.dsinks)[head] = static_cast<X>(sum);
}

template <class T>
void backward(const AttentionGradParams& g, Stream& stream) {
  using X = Wide<T>;
  const AttentionParams& p = g.forward;
  const int64_t rows = (p.cu_seqlens_q == nullptr ? p.batch : 1) * p.seq_q * p.heads;
  X* delta = stream.scratch_of<X>(std::max<int64_t>(rows, 1));
  if (rows > 0) {
    const int64_t blocks = (rows + kThreads / kRowLanes - 1) / (kThreads / kRowLanes);
    launch(attention_delta_kernel<T>, dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 65535))), dim3(kThreads), 0,
           stream, DeltaParams<X>{g, delta, rows, in_vectors(g.dout, p.head_dim_v)});
  }
  if constexpr (std::is_same_v<X, float>) {
    if (on_tensor_cores(p)) {
      attention_backward_mma(g, delta, stream);
    } else {
      attention_backward_fma(g, delta, stream);
    }
  } else {
    attention_backward_fma(g, delta, stream);
  }
  if (g.dsinks == nullptr || p.heads == 0) return;
  launch(attention_sinks_kernel<X>, dim3(static_cast<unsigned>(p.heads)), dim3(kThreads), 0, stream,
         SinkParams<X>{g, delta});
}

}  // namespace

void attention_forward(const AttentionParams& given, Stream& stream) {
  const AttentionParams p = for_kernels(given, "attention");
  if (on_tensor_cores(p)) return attention_forward_mma(p, stream);
  attention_forward_fma(p, stream);
}

void attention_backward(const AttentionGradParams& given, Stream& stream) {
  AttentionGradParams g = given;
  g.forward = for_kernels(given.forward, "attention");
  for_float_type(g.forward.type, "attention", [&](auto zero) { backward<decltype(zero)>(g, stream); });
}

}  // namespace lcore::cuda::generic
