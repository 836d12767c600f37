// How the warps of a convolution share out a tensor, and vectors of it. A thread computes tiles of 8 steps. Where steps
// are neighbours in memory (kRow) a tile is one channel's and the lanes of a warp stand side by side in time; elsewhere
// it is a few neighbouring channels' and the lanes stand side by side in channels.
#pragma once

#include "core/causal_conv1d.h"
#include "cuda/series.cuh"

namespace lcore::cuda::generic {

constexpr int kTile = 8;         // steps: 16 bytes of bfloat16
constexpr int kWarpsABlock = 4;  // 128 threads
constexpr int kBlocksAnSm = 4;   // of up to 128 registers a thread
constexpr int kBefore = kMaxConvWidth - 1;

// What one thread works on: tiles from `first` to `last` of a row, `stride` apart.
struct ConvWork {
  int64_t row, run, channel;
  int channels;  // 0: none
  int64_t first, last, stride;
};

template <bool kRow, int kChannels>
struct ConvShare {
  int64_t steps_a_run;

  __host__ __device__ int64_t runs(const CausalConv1dParams& p) const {
    return (p.sequences.steps + steps_a_run - 1) / steps_a_run;
  }
  __host__ __device__ static int64_t parts(const CausalConv1dParams& p) {
    return kRow ? p.dim : (p.dim + kWarpLanes * kChannels - 1) / (kWarpLanes * kChannels);
  }
  int64_t blocks(const CausalConv1dParams& p) const {
    return blocks_for(p.sequences.batch * runs(p) * parts(p), kWarpsABlock);
  }

  __device__ ConvWork work(const CausalConv1dParams& p) const {
    const int64_t warp = int64_t{blockIdx.x} * kWarpsABlock + threadIdx.x / kWarpLanes, all = runs(p), some = parts(p);
    const int lane = threadIdx.x % kWarpLanes;
    ConvWork w{};
    if (warp >= p.sequences.batch * all * some) return w;
    // Neighbouring warps take neighbouring memory.
    w.run = kRow ? warp % all : warp / some % all;
    const int64_t part = kRow ? warp / all % some : warp % some;
    w.row = warp / some / all;
    w.channel = kRow ? part : (part * kWarpLanes + lane) * kChannels;
    w.channels = static_cast<int>(w.channel < p.dim ? min(int64_t{kChannels}, p.dim - w.channel) : 0);
    w.stride = kRow ? kWarpLanes * kTile : kTile;
    w.first = w.run * steps_a_run + (kRow ? lane * kTile : 0);
    w.last = min((w.run + 1) * steps_a_run, p.sequences.steps);
    return w;
  }
};

// kCount neighbours; `whole`: all are there and lie as one vector in memory.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Run {
  T values[kCount];

  static constexpr int kBytes = kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16;
  using Vector = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  static constexpr int kVectors = static_cast<int>(kCount * sizeof(T)) / kBytes;

  __device__ void load(const T* from, int64_t stride, int count, bool whole) {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        reinterpret_cast<Vector*>(values)[i] = reinterpret_cast<const Vector*>(from)[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? from[i * stride] : narrow<T>(0);
  }
  __device__ void store(T* to, int64_t stride, int count, bool whole) const {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) reinterpret_cast<Vector*>(to)[i] = reinterpret_cast<const Vector*>(values)[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i * stride] = values[i];
    }
  }
};

// A series as runs: of kTile steps of a channel, or of kChannels channels of a step.
template <class T, bool kRow, int kChannels>
struct Runs {
  static constexpr int kCount = kRow ? kTile : kChannels;
  T* data;  // the thread's first channel, step 0
  int64_t step, stride;
  int count;
  bool whole;

  __device__ Runs(const Series& s, const ConvWork& w) {
    data = static_cast<T*>(const_cast<void*>(s.data)) + index_of(s, w.row, w.channel, 0);
    step = s.step;
    stride = kRow ? s.step : s.channel;
    count = kRow ? kTile : w.channels;
    using R = Run<T, kCount>;
    const auto address = reinterpret_cast<uintptr_t>(data);
    whole = stride == 1 && count == kCount && address % R::kBytes == 0 &&
            (kRow || step * static_cast<int64_t>(sizeof(T)) % R::kBytes == 0);
  }
  __device__ Run<T, kCount> at(int64_t t) const {
    Run<T, kCount> run;
    run.load(data + t * step, stride, count, whole);
    return run;
  }
  __device__ void put(int64_t t, const Run<T, kCount>& run) const { run.store(data + t * step, stride, count, whole); }
};

}  // namespace lcore::cuda::generic
