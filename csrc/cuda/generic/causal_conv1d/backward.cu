// Gradients of the causal convolution. With s the sum before the activation (computed again) and ds = dout act'(s):
//   dx_t = sum_w weight[w] ds_(t + width - 1 - w),  dweight[w] = sum_t ds_t x_(t - width + 1 + w),  dbias = sum_t ds_t.
// A tile computes the ds of the width - 1 steps behind it too, so it needs nothing from the next one: twice the
// exponentials, of which there are enough. Sums over time stay in a thread's registers through its run of tiles; runs
// are then added up in order by a second kernel: no atomics, the same bits every time.
#include "cuda/generic/causal_conv1d/conv.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {
namespace {

constexpr int kSums = kMaxConvWidth + 1;  // dweight by how far back, and dbias

// A tile's window of x, ds and sums must fit the registers: 170 of them at three blocks an SM.
template <class T, bool kRow>
constexpr int kGradChannels = kRow || sizeof(T) == 8 ? 1 : 2;
template <class T>
constexpr int kGradBlocksAnSm = sizeof(T) == 8 ? 2 : 3;

// Steps a warp: what its sums of 9 numbers a channel, written once, are small against.
template <bool kRow>
constexpr int64_t kGradRun = kRow ? 2048 : 256;

struct ConvGradArguments {
  CausalConv1dGradParams g;
  void* partial;  // [batch][runs][dim][kSums], float or double
};

template <class X>
__device__ X slope_of(const CausalConv1dParams& p, X sum, X dout) {
  return p.silu ? dout * silu_slope(sum, sigmoid(sum)) : dout;
}

// ds at one step of a sequence, from memory.
template <class X>
__device__ X slope_at(const CausalConv1dGradParams& g, const Place& place, int64_t channel, int64_t step) {
  const X dout = read<X>(g.dout.data, g.dout.type, index_of(g.dout, place.span.row, channel, step));
  return g.forward.silu ? slope_of(g.forward, sum_at<X>(g.forward, place, channel, step), dout) : dout;
}

// The gradient of the input at a step, which may be one of the initial state's.
template <class X>
__device__ X input_gradient(const CausalConv1dGradParams& g, const Place& place, int64_t channel, int64_t step) {
  const CausalConv1dParams& p = g.forward;
  X sum = 0;
  for (int back = 0; back < p.width; ++back) {
    if (!place.holds(step + back, step + back + 1)) continue;
    sum = fma(weight_at<X>(p, channel, back), slope_at<X>(g, place, channel, step + back), sum);
  }
  const int64_t column = step - (place.span.end - (p.width - 1));
  if (column < 0 || g.dfinal.data == nullptr) return sum;
  return sum + read<X>(g.dfinal.data, g.dfinal.type, state_index(p, place.sequence, channel, column));
}

template <class T, bool kRow>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock, kGradBlocksAnSm<T>)
    conv_backward_kernel(ConvGradArguments arguments) {
  using X = Wide<T>;
  constexpr int kChannels = kGradChannels<T, kRow>, kBehind = kTile + kBefore;
  const CausalConv1dGradParams& g = arguments.g;
  const CausalConv1dParams& p = g.forward;
  const ConvShare<kRow, kChannels> share{kGradRun<kRow>};
  const ConvWork w = share.work(p);
  if (__all_sync(kAllLanes, w.channels == 0)) return;
  X sums[kSums][kChannels] = {};
  if (w.channels > 0) {
    const Taps<X, kChannels> taps(p, w);
    const Runs<T, kRow, kChannels> in(p.x, w), dout(g.dout, w), dx(g.dx, w);
    Place place;
    for (int64_t t0 = w.first; t0 < w.last; t0 += w.stride) {
      place.find(p.sequences, w.row, t0);
      if (!place.holds(t0 - kTile, t0 + 2 * kTile)) {
        for (int64_t t = t0; t < min(t0 + kTile, w.last); ++t) {
          place.advance(p.sequences, t);
          if (!place.holds(t, t + 1)) break;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            if (c >= w.channels) continue;
            const int64_t channel = w.channel + c;
            const X ds = slope_at<X>(g, place, channel, t);
#pragma unroll
            for (int back = 0; back < kMaxConvWidth; ++back) {
              if (back < p.width) sums[back][c] = fma(ds, input_at<X>(p, place, channel, t - back), sums[back][c]);
            }
            sums[kMaxConvWidth][c] += ds;
            dx.data[t * g.dx.step + c * g.dx.channel] = narrow<T>(input_gradient<X>(g, place, channel, t));
          }
        }
        continue;
      }
      X x[kBehind + kBefore][kChannels], ds[kBehind][kChannels];  // x from kBefore steps before the tile on
      if constexpr (kRow) {
        const auto before = in.at(t0 - kTile), own = in.at(t0), behind = in.at(t0 + kTile);
        const auto dout_own = dout.at(t0), dout_behind = dout.at(t0 + kTile);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          if (i > 0) x[i - 1][0] = widen(before.values[i]);
          x[kBefore + i][0] = widen(own.values[i]);
          ds[i][0] = widen(dout_own.values[i]);
          if (i == kBefore) continue;
          x[kBefore + kTile + i][0] = widen(behind.values[i]);
          ds[kTile + i][0] = widen(dout_behind.values[i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kBehind + kBefore; ++i) {
          const auto run = in.at(t0 + i - kBefore);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) x[i][c] = widen(run.values[c]);
        }
#pragma unroll
        for (int i = 0; i < kBehind; ++i) {
          const auto run = dout.at(t0 + i);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) ds[i][c] = widen(run.values[c]);
        }
      }
      if (p.silu) {
#pragma unroll
        for (int t = 0; t < kBehind; ++t) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            X sum = taps.bias[c];
#pragma unroll
            for (int back = kBefore; back >= 0; --back) {
              if (back < p.width) sum = fma(taps.weights[back][c], x[kBefore + t - back][c], sum);
            }
            ds[t][c] = slope_of(p, sum, ds[t][c]);
          }
        }
      }
      Run<T, Runs<T, kRow, kChannels>::kCount> results[kRow ? 1 : kTile];
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          X sum = 0;
#pragma unroll
          for (int back = 0; back < kMaxConvWidth; ++back) {
            if (back >= p.width) continue;
            sum = fma(taps.weights[back][c], ds[t + back][c], sum);
            sums[back][c] = fma(ds[t][c], x[kBefore + t - back][c], sums[back][c]);
          }
          sums[kMaxConvWidth][c] += ds[t][c];
          results[kRow ? 0 : t].values[kRow ? t : c] = narrow<T>(sum);
        }
      }
#pragma unroll
      for (int i = 0; i < (kRow ? 1 : kTile); ++i) dx.put(t0 + i, results[i]);
    }
  }
  X* to = static_cast<X*>(arguments.partial) + ((w.row * share.runs(p) + w.run) * p.dim + w.channel) * kSums;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const X sum = kRow ? reduce_add(sums[k][c]) : sums[k][c];
      if (c < w.channels && (!kRow || threadIdx.x % kWarpLanes == 0)) to[c * kSums + k] = sum;
    }
  }
}

struct ConvSumArguments {
  CausalConv1dGradParams g;
  const void* partial;
  int64_t runs;  // of all rows
};

// One thread a sum, over the runs in order.
template <class X>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) conv_sums_kernel(ConvSumArguments arguments) {
  const CausalConv1dParams& p = arguments.g.forward;
  const int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, channel = item / kSums;
  const int k = static_cast<int>(item % kSums);
  if (channel >= p.dim || (k >= p.width && k < kMaxConvWidth)) return;
  double sum = 0;
  for (int64_t run = 0; run < arguments.runs; ++run) {
    sum += static_cast<const X*>(arguments.partial)[(run * p.dim + channel) * kSums + k];
  }
  if (k < p.width)
    static_cast<X*>(arguments.g.dweight)[channel * p.width + p.width - 1 - k] = static_cast<X>(sum);
  else if (arguments.g.dbias != nullptr)
    static_cast<X*>(arguments.g.dbias)[channel] = static_cast<X>(sum);
}

template <class X>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) conv_initial_kernel(CausalConv1dGradParams g) {
  const CausalConv1dParams& p = g.forward;
  const int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (item >= p.sequences.count * p.dim) return;
  const int64_t sequence = item / p.dim, channel = item % p.dim;
  const Place place{sequence, span_of(p.sequences, sequence)};
  for (int column = 0; column < p.width - 1; ++column) {
    const X sum = input_gradient<X>(g, place, channel, place.span.begin - (p.width - 1) + column);
    write<X>(const_cast<void*>(g.dinitial.data), g.dinitial.type, state_index(p, sequence, channel, column), sum);
  }
}

template <class T, bool kRow>
void launch_backward(const CausalConv1dGradParams& g, Stream& stream) {
  using X = Wide<T>;
  const CausalConv1dParams& p = g.forward;
  const ConvShare<kRow, kGradChannels<T, kRow>> share{kGradRun<kRow>};
  const int64_t runs = p.sequences.count == 0 ? 0 : p.sequences.batch * share.runs(p);
  const dim3 block(kWarpLanes * kWarpsABlock);
  X* partial = stream.scratch_of<X>(runs * p.dim * kSums);
  if (runs > 0) launch(conv_backward_kernel<T, kRow>, dim3(share.blocks(p)), block, 0, stream, {g, partial});
  launch(conv_sums_kernel<X>, dim3(blocks_for(p.dim * kSums, block.x)), block, 0, stream, {g, partial, runs});
  const int64_t states = p.sequences.count * p.dim;
  if (g.dinitial.data == nullptr || p.width == 1 || states == 0) return;
  launch(conv_initial_kernel<X>, dim3(blocks_for(states, block.x)), block, 0, stream, g);
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dGradParams& g, Stream& stream) {
  if (g.forward.dim == 0) return;
  const bool by_channel = g.forward.x.channel == 1 && g.forward.dim > 1;
  for_float_type(g.forward.x.type, "causal_conv1d", [&](auto zero) {
    using T = decltype(zero);
    by_channel ? launch_backward<T, false>(g, stream) : launch_backward<T, true>(g, stream);
  });
}

}  // namespace lcore::cuda::generic
