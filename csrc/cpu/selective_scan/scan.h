// What the forward and the backward of a selective scan share: a register of channels, the tiles of a chunk, and the
// step of the recurrence itself, so that states recomputed in the backward have the forward's bits.
#pragma once

#include "core/selective_scan.h"
#include "cpu/channel_tile.h"
#include "cpu/chunks.h"
#include "cpu/decay.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// Up to a register of neighbouring channels of one group.
struct Lane {
  int64_t first;
  int count;
};

inline int64_t channels_a_group(const SelectiveScanParams& p) { return p.dim / p.groups; }

template <class T>
int64_t lanes_a_group(const SelectiveScanParams& p) {
  return (channels_a_group(p) + kLanes<T> - 1) / kLanes<T>;
}

template <class T>
Lane lane_of(const SelectiveScanParams& p, int64_t group, int64_t index) {
  const int64_t first = index * kLanes<T>, size = channels_a_group(p);
  return {group * size + first, static_cast<int>(std::min<int64_t>(kLanes<T>, size - first))};
}

template <class T>
constexpr DType type_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// One number a channel.
template <class T>
Vec<T> load_parameter(const void* data, const Lane& lane) {
  if (data != nullptr && lane.count == kLanes<T>) return load(static_cast<const T*>(data) + lane.first);
  alignas(64) T values[kLanes<T>] = {};
  if (data != nullptr) std::copy_n(static_cast<const T*>(data) + lane.first, lane.count, values);
  return load(values);
}

// (channels, states) contiguous, of any type, as [states][kLanes].
inline Series state_rows(const States& s, int64_t sequence, const Lane& lane, const SelectiveScanParams& p) {
  const int64_t slot = s.slots == nullptr ? sequence : s.slots[sequence];
  return at({s.data, s.type, p.dim * p.states, p.states, 1}, slot, lane.first, 0);
}

template <class T>
void load_states(const States& from, int64_t sequence, const Lane& lane, const SelectiveScanParams& p, T* states) {
  load_tile(state_rows(from, sequence, lane, p), lane.count, p.states, states);
}

template <class T>
void store_states(const T* states, const States& to, int64_t sequence, const Lane& lane, const SelectiveScanParams& p) {
  store_tile(states, lane.count, p.states, state_rows(to, sequence, lane, p));
}

// A times log2 e, as [states][kLanes]. Returns for each channel the size of delta up to which the decays of all its
// states are bounded (decay.h); NaN if a rate is.
template <class T>
Vec<T> load_rates(const SelectiveScanParams& p, const Lane& lane, T* rates) {
  load_states(States{p.a, type_of<T>(), nullptr}, 0, lane, p, rates);
  Vec<T> largest{};
  for (int i = 0; i < p.states * kLanes<T>; i += kLanes<T>) {
    const Vec<T> rate = load(rates + i) * kLog2E<T>, size = rate < T{0} ? -rate : rate;
    largest = size <= largest ? largest : size;
    store(rates + i, rate);
  }
  return T{kDecayBound} / largest;
}

// B or C of a chunk as blocks of kLanes states, [block][kChunk][kLanes]: a state's value at a step is broadcast.
template <class T>
struct StateSteps {
  T* data;
  static int64_t size(int states) { return round_up_lanes<T>(states) * kChunk; }
  const T* of(int state) const { return data + state / kLanes<T> * kChunk * kLanes<T> + state % kLanes<T>; }
  void load(Series in, int64_t group_stride, int64_t row, int64_t group, const Chunk& chunk, int states) const {
    in = at(in, row, 0, chunk.begin);
    in.data = static_cast<const char*>(in.data) + group * group_stride * static_cast<int64_t>(size_of(in.type));
    for (int n = 0; n < states; n += kLanes<T>) {
      load_tile(at(in, 0, n, 0), std::min(kLanes<T>, states - n), chunk.steps, data + n * kChunk);
    }
  }
};

// delta of a chunk after bias and softplus, and its derivative by what was given, where `slope` is not nullptr. Returns
// whether all of it lies within `bound` in size.
template <class T>
bool load_delta(const SelectiveScanParams& p, int64_t row, const Lane& lane, const Chunk& chunk, Vec<T> bound, T* delta,
                T* slope) {
  const Vec<T> bias = load_parameter<T>(p.delta_bias, lane);
  load_tile(at(p.delta, row, lane.first, chunk.begin), lane.count, chunk.steps, delta);
  auto within = bound == bound;
  for (int i = 0; i < chunk.steps * kLanes<T>; i += kLanes<T>) {
    const Vec<T> raw = load(delta + i) + bias, step = p.delta_softplus ? softplus<T>(raw) : raw;
    within &= (step <= bound) & (-step <= bound);
    store(delta + i, step);
    if (slope != nullptr) store(slope + i, p.delta_softplus ? softplus_slope<T>(raw) : splat(T{1}));
  }
  bool all = true;
  for (int i = 0; i < kLanes<T>; ++i) all = all && within[i] != 0;
  return all;
}

// States that are advanced at once: their values and rates stay in registers, beside the constants of the decay, and
// their B and C lie in one block.
template <class T>
inline constexpr int kStates = std::min(kRegisters / 4, kLanes<T>);

// Calls fn.operator()<count>(first) for runs of kCount states, and for what is left.
template <int kCount, class Fn>
void for_each_run(int first, int states, const Fn& fn) {
  for (; first + kCount <= states; first += kCount) fn.template operator()<kCount>(first);
  if constexpr (kCount > 1) for_each_run<kCount / 2>(first, states, fn);
}

// Calls fn.operator()<kBounded>() with the flag as a constant.
template <class Fn>
void with_bound(bool bounded, const Fn& fn) {
  if (bounded) return fn.template operator()<true>();
  return fn.template operator()<false>();
}

}  // namespace lcore::cpu::LCORE_ISA
