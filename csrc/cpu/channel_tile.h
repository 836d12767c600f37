// A tile of a (channels, steps) tensor: one register of channels a step, tile[step * kLanes<T> + channel]. Rows of
// steps are transposed in registers, rows of channels are read as they lie, anything else goes by element.
#pragma once

#include <algorithm>

#include "core/sequences.h"
#include "cpu/pack_rows.h"
#include "cpu/transpose.h"

namespace lcore::cpu::LCORE_ISA {

// The same tensor from another channel and step on, in row `batch`.
inline Series at(Series in, int64_t batch, int64_t channel, int64_t step) {
  const int64_t offset = batch * in.batch + channel * in.channel + step * in.step;
  in.data = static_cast<const char*>(in.data) + offset * static_cast<int64_t>(size_of(in.type));
  return in;
}

// Channels [0, channels) of steps [0, steps); lanes past the channels are zero.
template <class T>
inline void load_tile(const Series& in, int channels, int steps, T* tile) {
  constexpr int kLane = kLanes<T>;
  with_type(in.data, in.type, [&](const auto* src) {
    using Element = std::remove_cvref_t<decltype(*src)>;
    int t = 0;
    if constexpr (kLoadsVectors<T, Element>) {
      if (channels == kLane && in.channel == 1) {
        for (; t < steps; ++t) {
          // Channels to the right come next, and the hardware sees no run in rows that lie far apart.
          __builtin_prefetch(reinterpret_cast<const char*>(src + t * in.step) + 64);
          store(tile + t * kLane, load_as(src + t * in.step, T{}));
        }
      } else if (channels == kLane && in.step == 1) {
        for (; t + kLane <= steps; t += kLane) {
          Vec<T> square[kLane];
#pragma GCC unroll 16
          for (int i = 0; i < kLane; ++i) square[i] = load_as(src + i * in.channel + t, T{});
          transpose_square<T>(square);
#pragma GCC unroll 16
          for (int i = 0; i < kLane; ++i) store(tile + (t + i) * kLane, square[i]);
        }
      }
    }
    for (; t < steps; ++t) {
      T* row = tile + t * kLane;
      for (int i = 0; i < channels; ++i) row[i] = static_cast<T>(widen(src[i * in.channel + t * in.step]));
      std::fill(row + channels, row + kLane, T{0});
    }
  });
}

template <class T, class Element>
inline void store_as(Element* p, Vec<T> v) {
  if constexpr (sizeof(Element) == 2) {
    store_half(p, v);
  } else {
    store(p, v);
  }
}

// And back, rounded to nearest even.
template <class T>
inline void store_tile(const T* tile, int channels, int steps, const Series& out) {
  constexpr int kLane = kLanes<T>;
  with_type(out.data, out.type, [&](const auto* typed) {
    using Element = std::remove_cvref_t<decltype(*typed)>;
    auto* dst = const_cast<Element*>(typed);
    int t = 0;
    if constexpr (kLoadsVectors<T, Element>) {
      if (channels == kLane && out.channel == 1) {
        for (; t < steps; ++t) store_as<T>(dst + t * out.step, load(tile + t * kLane));
      } else if (channels == kLane && out.step == 1) {
        for (; t + kLane <= steps; t += kLane) {
          Vec<T> square[kLane];
#pragma GCC unroll 16
          for (int i = 0; i < kLane; ++i) square[i] = load(tile + (t + i) * kLane);
          transpose_square<T>(square);
#pragma GCC unroll 16
          for (int i = 0; i < kLane; ++i) store_as<T>(dst + i * out.channel + t, square[i]);
        }
      }
    }
    for (; t < steps; ++t) {
      for (int i = 0; i < channels; ++i) narrow(tile[t * kLane + i], dst + i * out.channel + t * out.step);
    }
  });
}

// The lanes of each step's register summed: sums[step].
template <class T>
inline void sum_lanes(const T* tile, int steps, T* sums) {
  constexpr int kLane = kLanes<T>;
  int t = 0;
  for (; t + kLane <= steps; t += kLane) {
    Vec<T> square[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) square[i] = load(tile + (t + i) * kLane);
    transpose_square<T>(square);
    Vec<T> sum = square[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLane; ++i) sum += square[i];
    store(sums + t, sum);
  }
  for (; t < steps; ++t) {
    T sum = tile[t * kLane];
    for (int i = 1; i < kLane; ++i) sum += tile[t * kLane + i];
    sums[t] = sum;
  }
}

}  // namespace lcore::cpu::LCORE_ISA
