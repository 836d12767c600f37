// What the forward and the backward of a selective scan share: how a block's threads lie over channels and states, the
// tiles of a chunk in shared memory, and the step of the recurrence.
#pragma once

#include "core/selective_scan.h"
#include "cuda/gates.cuh"
#include "cuda/ptx/shared.h"
#include "cuda/series.cuh"
#include "cuda/warp.cuh"

namespace lcore::cuda::generic {

// Four lanes share a channel and each has four states in registers, so 16 states, Mamba's number, take one pass over a
// chunk; more take several. 128 threads are 32 channels, which read each B and C that the block has brought.
constexpr int kScanThreads = 128;
constexpr int kLanes = 4;
constexpr int kPerLane = 4;
constexpr int kStates = kLanes * kPerLane;
constexpr int kChannels = kScanThreads / kLanes;
constexpr int kSteps = static_cast<int>(kChunk);
constexpr int kRow = kChannels + 1;  // of a tile over channels: steps fall into different banks
constexpr int kTileSize = kSteps * kRow;

template <class X>
constexpr int kStateRow = kStates + 16 / static_cast<int>(sizeof(X));  // rows stay aligned to 16 bytes

__host__ __device__ inline int passes_of(const SelectiveScanParams& p) { return (p.states + kStates - 1) / kStates; }
__host__ __device__ inline int64_t blocks_a_group(const SelectiveScanParams& p) {
  return (p.dim / p.groups + kChannels - 1) / kChannels;
}
__device__ inline int64_t chunks_of(const Span& span) {
  const int64_t chunks = (span.end - span.begin + kChunk - 1) / kChunk;
  return chunks > 0 ? chunks : 1;
}
// Of a sequence's first checkpoint.
__device__ inline int64_t first_slot(const Sequences& s, int64_t sequence, const Span& span) {
  return s.offsets == nullptr ? sequence * (s.steps / kChunk + 1) : span.begin / kChunk + sequence;
}

// The channels of a block and what of them this thread has.
struct ScanPlace {
  int64_t group, first;
  int count;         // channels of the block
  int column, lane;  // of the thread: its channel in the block, its states' quarter

  __device__ ScanPlace(const SelectiveScanParams& p, int64_t group_of_block, int64_t block) {
    const int64_t size = p.dim / p.groups;
    group = group_of_block;
    first = group * size + block * kChannels;
    count = static_cast<int>(min(int64_t{kChannels}, size - block * kChannels));
    column = threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
  }
  __device__ bool here() const { return column < count; }
  __device__ int64_t channel() const { return first + (here() ? column : 0); }
  // How many of the thread's states in a pass exist.
  __device__ int states(const SelectiveScanParams& p, int pass) const {
    const int left = p.states - pass * kStates - lane * kPerLane;
    return left < 0 ? 0 : left < kPerLane ? left : kPerLane;
  }
};

// f(step, column) for every element of a tile, neighbouring threads along what is contiguous in s.
template <class F>
__device__ inline void for_each_element(const Series& s, int steps, int columns, F&& f) {
  if (steps > 1 && s.step < s.channel) {
    for (int i = threadIdx.x; i < columns * kSteps; i += kScanThreads) {
      if (i % kSteps < steps) f(i % kSteps, i / kSteps);
    }
  } else {
    for (int i = threadIdx.x; i < steps * kChannels; i += kScanThreads) {
      if (i % kChannels < columns) f(i / kChannels, i % kChannels);
    }
  }
}

// Steps from `begin` on of the block's channels, f(value, column) of each, as [step][kRow]; 0 where there is no
// channel.
template <class X, class F>
__device__ inline void load_channels(const Series& s, const Span& span, int64_t begin, int steps,
                                     const ScanPlace& place, X* tile, F&& f) {
  const int64_t base = index_of(s, span.row, place.first, begin);
  with_type<X>(s.data, s.type, [&](const auto* from) {
    for_each_element(s, steps, kChannels, [&](int t, int c) {
      tile[t * kRow + c] = c < place.count ? f(widen(from[base + t * s.step + c * s.channel]), c) : X{0};
    });
  });
}

// The same for a pass's states of B or C, as [step][kStateRow].
template <class X>
__device__ inline void load_projection(const Series& s, int64_t group_offset, const Span& span, int64_t begin,
                                       int steps, int pass, int states, X* tile) {
  const int count = min(kStates, states - pass * kStates);
  const int64_t base = group_offset + index_of(s, span.row, int64_t{pass} * kStates, begin);
  with_type<X>(s.data, s.type, [&](const auto* from) {
    const bool along_steps = steps > 1 && s.step < s.channel;
    for (int i = threadIdx.x; i < kSteps * kStates; i += kScanThreads) {
      const int t = along_steps ? i % kSteps : i / kStates, n = along_steps ? i / kSteps : i % kStates;
      if (t < steps) tile[t * kStateRow<X> + n] = n < count ? widen(from[base + t * s.step + n * s.channel]) : X{0};
    }
  });
}

// delta after bias and softplus; its derivative by what was given goes to *slope where that is not nullptr.
template <class X>
__device__ inline X step_size(const SelectiveScanParams& p, int64_t channel, X delta, X* slope) {
  if (p.delta_bias != nullptr) delta += static_cast<const X*>(p.delta_bias)[channel];
  if (slope != nullptr) *slope = p.delta_softplus ? softplus_slope(delta) : X{1};
  return p.delta_softplus ? softplus(delta) : delta;
}

// A thread's states of one pass.
template <class X>
struct States4 {
  X values[kPerLane];

  // A vector of shared memory.
  __device__ void load(const X* from) {
    constexpr int kVectors = kPerLane * static_cast<int>(sizeof(X)) / 16;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ X& operator[](int i) { return values[i]; }
  __device__ const X& operator[](int i) const { return values[i]; }
};

// Where a channel's states of a pass begin in a tensor (slots, dim, states).
__device__ inline int64_t states_index(const SelectiveScanParams& p, int64_t slot, const ScanPlace& place, int pass) {
  return (slot * p.dim + place.channel()) * p.states + pass * kStates + place.lane * kPerLane;
}

template <class X>
__device__ inline void read_states(const States& from, int64_t index, int count, X* h) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    h[i] = i < count && from.data != nullptr ? read<X>(from.data, from.type, index + i) : X{0};
}

template <class X>
__device__ inline void write_states(const States& to, int64_t index, int count, const X* h) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < count) write<X>(const_cast<void*>(to.data), to.type, index + i, h[i]);
  }
}

template <class X>
constexpr DType kTypeOf = sizeof(X) == 8 ? DType::kFloat64 : DType::kFloat32;

// A times log2 e, or A.
template <class X>
__device__ inline void load_rates(const SelectiveScanParams& p, const ScanPlace& place, int pass, X factor, X* rates) {
  read_states<X>({p.a, kTypeOf<X>, nullptr}, states_index(p, 0, place, pass), place.here() ? place.states(p, pass) : 0,
                 rates);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) rates[i] *= factor;
}

}  // namespace lcore::cuda::generic
