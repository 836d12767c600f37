// Causal depthwise convolution: out_t = act(bias + sum_w weight[w] x_(t - width + 1 + w)), what stands before a
// sequence being its state (conv.cuh). Bound by memory: a tile's x comes in vectors and the width - 1 steps before it
// from L1, where a neighbouring tile has just brought them. Tiles that meet the edge of a sequence go step by step.
// An update is one thread a channel, its window in registers, so that a decoding step is one launch.
#include "cuda/generic/causal_conv1d/conv.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lcore::cuda::generic {
namespace {

// Channels a tile where channels are neighbours: 8 bytes of 2-byte types, else 16: more would not fit the registers.
template <class T, bool kRow>
constexpr int kForwardChannels = kRow             ? 1
                                 : sizeof(T) == 8 ? 2
                                                  : 4;

// Steps a warp: one tile a lane, or eight tiles that share the weights.
template <bool kRow>
constexpr int64_t kForwardRun = kRow ? kWarpLanes * kTile : 8 * kTile;

template <class T, bool kRow>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock, kBlocksAnSm) conv_forward_kernel(CausalConv1dParams p) {
  using X = Wide<T>;
  constexpr int kChannels = kForwardChannels<T, kRow>;
  const ConvWork w = ConvShare<kRow, kChannels>{kForwardRun<kRow>}.work(p);
  if (w.channels == 0) return;
  const Taps<X, kChannels> taps(p, w);
  const Runs<T, kRow, kChannels> in(p.x, w), out(p.out, w);
  Place place;
  for (int64_t t0 = w.first; t0 < w.last; t0 += w.stride) {
    place.find(p.sequences, w.row, t0);
    if (!place.holds(t0 - kTile, t0 + kTile)) {
      for (int64_t t = t0; t < min(t0 + kTile, w.last); ++t) {
        place.advance(p.sequences, t);
        if (!place.holds(t, t + 1)) break;
        for (int c = 0; c < w.channels; ++c) {
          const X sum = sum_at<X>(p, place, w.channel + c, t);
          out.data[t * p.out.step + c * p.out.channel] = narrow<T>(p.silu ? silu(sum) : sum);
        }
      }
      continue;
    }
    X sums[kTile][kChannels];
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sums[t][c] = taps.bias[c];
    }
    // Inputs in order of time meet the steps that they reach: each step's taps come from the oldest to the newest.
    const auto meet = [&](int at, int c, X x) {
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        const int back = t - at;
        if (back >= 0 && back < kMaxConvWidth && back < p.width) sums[t][c] = fma(taps.weights[back][c], x, sums[t][c]);
      }
    };
    if constexpr (kRow) {
      const auto before = in.at(t0 - kTile), own = in.at(t0);
#pragma unroll
      for (int i = 0; i < kTile; ++i) meet(i - kTile, 0, widen(before.values[i]));
#pragma unroll
      for (int i = 0; i < kTile; ++i) meet(i, 0, widen(own.values[i]));
    } else {
#pragma unroll
      for (int at = -kBefore; at < kTile; ++at) {
        if (at <= -p.width) continue;
        const auto own = in.at(t0 + at);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) meet(at, c, widen(own.values[c]));
      }
    }
    const auto act = [&](X sum) { return narrow<T>(p.silu ? silu(sum) : sum); };
    if constexpr (kRow) {
      Run<T, kTile> results;
#pragma unroll
      for (int t = 0; t < kTile; ++t) results.values[t] = act(sums[t][0]);
      out.put(t0, results);
    } else {
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        Run<T, kChannels> results;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) results.values[c] = act(sums[t][c]);
        out.put(t0 + t, results);
      }
    }
  }
}

// f(sequence, channel) for every pair: one thread each.
template <class F>
__device__ void for_each_channel(const CausalConv1dParams& p, F&& f) {
  const int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (item < p.sequences.count * p.dim) f(item / p.dim, item % p.dim);
}

// The last width - 1 steps of every sequence.
template <class X>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) conv_state_kernel(CausalConv1dParams p) {
  for_each_channel(p, [&](int64_t sequence, int64_t channel) {
    const Place place{sequence, span_of(p.sequences, sequence)};
    for (int column = 0; column < p.width - 1; ++column) {
      const X x = input_at<X>(p, place, channel, place.span.end - (p.width - 1) + column);
      write<X>(const_cast<void*>(p.final.data), p.final.type, state_index(p, sequence, channel, column), x);
    }
  });
}

// Every step of a row in order, the state read first and written last, where it lies.
template <class X>
__global__ void __launch_bounds__(kWarpLanes* kWarpsABlock) conv_update_kernel(CausalConv1dParams p) {
  for_each_channel(p, [&](int64_t sequence, int64_t channel) {
    const int64_t slot = slot_of(p.initial, sequence);
    if (slot < 0) return;
    const Place place{sequence, span_of(p.sequences, sequence)};
    X seen[kMaxConvWidth] = {};  // by how far back; [0] is the step's own
    X weights[kMaxConvWidth] = {};
    const X bias = bias_at<X>(p, channel);
#pragma unroll
    for (int back = 0; back < kMaxConvWidth; ++back) {
      if (back >= p.width) continue;
      weights[back] = weight_at<X>(p, channel, back);
      if (back + 1 < p.width) seen[back] = input_at<X>(p, place, channel, place.span.begin - 1 - back);
    }
    for (int64_t t = place.span.begin; t < place.span.end; ++t) {
#pragma unroll
      for (int back = kBefore; back > 0; --back) seen[back] = seen[back - 1];
      seen[0] = input_at<X>(p, place, channel, t);
      X sum = bias;
#pragma unroll
      for (int back = kBefore; back >= 0; --back) {
        if (back < p.width) sum = fma(weights[back], seen[back], sum);
      }
      write<X>(p.out, index_of(p.out, place.span.row, channel, t), p.silu ? silu(sum) : sum);
    }
#pragma unroll
    for (int back = 0; back < kBefore; ++back) {
      if (back + 1 >= p.width) continue;
      write<X>(const_cast<void*>(p.final.data), p.final.type, state_index(p, slot, channel, p.width - 2 - back),
               seen[back]);
    }
  });
}

template <class T, bool kRow>
void launch_forward(const CausalConv1dParams& p, Stream& stream) {
  const ConvShare<kRow, kForwardChannels<T, kRow>> share{kForwardRun<kRow>};
  launch(conv_forward_kernel<T, kRow>, dim3(share.blocks(p)), dim3(kWarpLanes * kWarpsABlock), 0, stream, p);
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p, Stream& stream) {
  const int64_t channels = p.sequences.count * p.dim;
  const dim3 grid(blocks_for(channels, kWarpLanes * kWarpsABlock)), block(kWarpLanes * kWarpsABlock);
  if (channels == 0) return;
  if (p.final.data != nullptr && p.final.data == p.initial.data) {
    return launch(p.is_double ? conv_update_kernel<double> : conv_update_kernel<float>, grid, block, 0, stream, p);
  }
  if (p.sequences.steps > 0) {
    const bool by_channel = p.x.channel == 1 && p.dim > 1;
    for_float_type(p.x.type, "causal_conv1d", [&](auto zero) {
      using T = decltype(zero);
      by_channel ? launch_forward<T, false>(p, stream) : launch_forward<T, true>(p, stream);
    });
  }
  if (p.final.data == nullptr || p.width == 1) return;
  launch(p.is_double ? conv_state_kernel<double> : conv_state_kernel<float>, grid, block, 0, stream, p);
}

}  // namespace lcore::cuda::generic
