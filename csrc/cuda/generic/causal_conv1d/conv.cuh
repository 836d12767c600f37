// The taps of a convolution's step wherever they lie: in its sequence or, before it, in the initial state. Taps are
// added from the oldest to the newest with one fused multiply-add each, on every path, so the bits do not depend on the
// path.
#pragma once

#include "cuda/gates.cuh"
#include "cuda/generic/causal_conv1d/runs.cuh"

namespace lcore::cuda::generic {

// The sequence that a step lies in, if one does.
struct Place {
  int64_t sequence = 0;
  Span span{0, 0, 0};

  __device__ void find(const Sequences& s, int64_t row, int64_t step) {
    sequence = sequence_at(s, row, step);
    span = span_of(s, sequence);
  }
  __device__ bool holds(int64_t first, int64_t last) const { return first >= span.begin && last <= span.end; }
  __device__ void advance(const Sequences& s, int64_t step) {
    while (step >= span.end && s.offsets != nullptr && sequence + 1 < s.count) span = span_of(s, ++sequence);
  }
};

// Column `column` of a channel's state.
__device__ inline int64_t state_index(const CausalConv1dParams& p, int64_t slot, int64_t channel, int64_t column) {
  return (slot * p.dim + channel) * (p.width - 1) + column;
}

// x at a step of a sequence, or before its beginning the initial state.
template <class X>
__device__ X input_at(const CausalConv1dParams& p, const Place& place, int64_t channel, int64_t step) {
  if (step >= place.span.begin) return read<X>(p.x.data, p.x.type, index_of(p.x, place.span.row, channel, step));
  if (p.initial.data == nullptr) return X{0};
  const int64_t slot = slot_of(p.initial, place.sequence), column = step - place.span.begin + p.width - 1;
  return read<X>(p.initial.data, p.initial.type, state_index(p, slot, channel, column));
}

// The weight of the input `back` steps before.
template <class X>
__device__ X weight_at(const CausalConv1dParams& p, int64_t channel, int back) {
  return static_cast<const X*>(p.weight)[channel * p.width + p.width - 1 - back];
}

template <class X>
__device__ X bias_at(const CausalConv1dParams& p, int64_t channel) {
  return p.bias == nullptr ? X{0} : static_cast<const X*>(p.bias)[channel];
}

// The sum at one step, where its taps may lie outside the sequence.
template <class X>
__device__ X sum_at(const CausalConv1dParams& p, const Place& place, int64_t channel, int64_t step) {
  X sum = bias_at<X>(p, channel);
  for (int back = p.width - 1; back >= 0; --back) {
    sum = fma(weight_at<X>(p, channel, back), input_at<X>(p, place, channel, step - back), sum);
  }
  return sum;
}

// Weights by how far back, and the bias, of a thread's channels.
template <class X, int kChannels>
struct Taps {
  X weights[kMaxConvWidth][kChannels];
  X bias[kChannels];

  __device__ Taps(const CausalConv1dParams& p, const ConvWork& w) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t channel = w.channel + (c < w.channels ? c : 0);
      bias[c] = bias_at<X>(p, channel);
#pragma unroll
      for (int back = 0; back < kMaxConvWidth; ++back) {
        weights[back][c] = back < p.width ? weight_at<X>(p, channel, back) : X{0};
      }
    }
  }
};

}  // namespace lcore::cuda::generic
