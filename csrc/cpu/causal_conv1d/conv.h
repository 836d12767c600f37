// What the forward and the backward of a causal convolution share: a block of steps as a flat tile, with the steps
// before it in front, and the convolution of a tile. Where steps are neighbours in memory a tile is one channel and a
// tap lies one element on; elsewhere it is a register of channels a step and a tap lies a register on. The rest of the
// code is the same, and so are the bits.
#pragma once

#include "core/causal_conv1d.h"
#include "cpu/channel_tile.h"
#include "cpu/chunks.h"
#include "cpu/gates.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {

// One channel's row of steps, or a register of channels.
template <class T, bool kRow>
struct ConvTile {
  static constexpr int kUnit = kRow ? 1 : kLanes<T>;  // elements between steps
  // Steps a tile; steps and channels an item, which takes what is contiguous in memory as one run: the hardware sees it
  // coming.
  static constexpr int64_t kBlock = kRow ? 1024 : 256;
  static constexpr int64_t kRun = kRow ? 16384 : kBlock;
  static constexpr int64_t kChannels = kRow ? 16 : 512;
  static constexpr int64_t size(int64_t steps) { return steps * kUnit + kLanes<T>; }

  // Not inlined, as save: each is four element types.
  [[gnu::noinline]] static void load(const Series& in, int channels, int steps, T* tile) {
    if constexpr (kRow) {
      with_type(in.data, in.type, [&](const auto* src) { load_row(src, in.step, tile, steps); });
    } else {
      load_tile(in, channels, steps, tile);
    }
  }
  [[gnu::noinline]] static void save(const T* tile, int channels, int steps, const Series& out) {
    if (kRow && out.step == 1) {
      store_row(tile, steps, const_cast<void*>(out.data), out.type);
    } else if constexpr (kRow) {
      with_type(out.data, out.type, [&](const auto* typed) {
        auto* dst = const_cast<std::remove_cvref_t<decltype(*typed)>*>(typed);
        for (int t = 0; t < steps; ++t) narrow(tile[t], dst + t * out.step);
      });
    } else {
      store_tile(tile, channels, steps, out);
    }
  }
  // A number a channel, `stride` apart.
  static Vec<T> parameter(const void* data, int64_t stride, int channels) {
    const T* from = static_cast<const T*>(data);
    if constexpr (kRow) return splat(*from);
    Vec<T> v{};
    for (int i = 0; i < channels; ++i) v[i] = from[i * stride];
    return v;
  }
};

inline Series conv_state(const States& s, int64_t sequence, int64_t channel, const CausalConv1dParams& p) {
  const int64_t slot = s.slots == nullptr ? sequence : s.slots[sequence], columns = p.width - 1;
  return at({s.data, s.type, p.dim * columns, columns, 1}, slot, channel, 0);
}

// x from width - 1 steps before a chunk to `steps` after its beginning; before the sequence stands its initial state.
template <class T, bool kRow>
void load_inputs(const CausalConv1dParams& p, int64_t row, int64_t channel, int channels, const Chunk& chunk, int steps,
                 int64_t since, T* tile) {
  using Tile = ConvTile<T, kRow>;
  const int before = p.width - 1, own = static_cast<int>(std::min<int64_t>(before, since)), given = before - own;
  if (given > 0 && p.initial.data == nullptr) std::fill_n(tile, given * Tile::kUnit, T{0});
  if (given > 0 && p.initial.data != nullptr) {
    const Series state = conv_state(p.initial, row + chunk.sequence, channel, p);
    Tile::load(at(state, 0, 0, before - given), channels, given, tile);
  }
  Tile::load(at(p.x, row, channel, chunk.begin - own), channels, own + steps, tile + given * Tile::kUnit);
}

// sink(i, bias + sum_w weight[w] tile[i + w steps]) for every register i of `count` elements: taps are added in order.
template <class T, int kUnit, int kWidth, class Sink>
void convolve(const T* __restrict tile, const Vec<T>* weights, Vec<T> bias, int64_t count, const Sink& sink) {
  Vec<T> weight[kWidth];
  for (int w = 0; w < kWidth; ++w) weight[w] = weights[w];
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vec<T> sum = bias;
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) sum += weight[w] * load(tile + i + w * kUnit);
    sink(i, sum);
  }
}

// The same with the width as a number. float64 runs for gradient checks: one loop for all widths spares the compiler
// seven eighths of its work.
template <class T, int kUnit, int kWidth = kMaxConvWidth, class Sink>
void convolve_width(const T* tile, int width, const Vec<T>* weights, Vec<T> bias, int64_t count, const Sink& sink) {
  if constexpr (sizeof(T) == 8) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      Vec<T> sum = bias;
      for (int w = 0; w < width; ++w) sum += weights[w] * load(tile + i + w * kUnit);
      sink(i, sum);
    }
  } else {
    if (width == kWidth) return convolve<T, kUnit, kWidth>(tile, weights, bias, count, sink);
    if constexpr (kWidth > 1) convolve_width<T, kUnit, kWidth - 1>(tile, width, weights, bias, count, sink);
  }
}

// Chunks of sequences of at most `block` steps, in runs of at most `longest`, or all in one: what an item takes. Run i
// is chunks [ends[i - 1], ends[i]).
struct ConvRuns {
  ConvRuns(const Sequences& s, int64_t block, int64_t longest, bool one = false) : chunks(chunks_of(s, block)) {
    int64_t steps = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(chunks.size()); ++i) {
      if (!one && i > 0 && steps + chunks[i].steps > longest) {
        ends.push_back(i);
        steps = 0;
      }
      steps += chunks[i].steps;
    }
    if (!chunks.empty()) ends.push_back(static_cast<int64_t>(chunks.size()));
    for (const Chunk& chunk : chunks) {
      begins.push_back(chunk.first ? chunk.begin : begins.back());
    }
  }
  int64_t count() const { return static_cast<int64_t>(ends.size()); }
  int64_t begin_of(int64_t run) const { return run == 0 ? 0 : ends[run - 1]; }

  std::vector<Chunk> chunks;
  std::vector<int64_t> ends;
  std::vector<int64_t> begins;  // of a chunk's sequence
};

// Calls fn(row, run, first channel, last, worker) for every item.
template <class Tile, class Fn>
void for_each_conv_item(const CausalConv1dParams& p, const ConvRuns& runs, Executor& executor, const Fn& fn) {
  constexpr int64_t kChannels = Tile::kChannels;
  const int64_t parts = (p.dim + kChannels - 1) / kChannels;
  executor.run(p.sequences.batch * runs.count() * parts, [&](int64_t item, int worker) {
    const int64_t first = item % parts * kChannels;
    fn(item / parts / runs.count(), item / parts % runs.count(), first, std::min(first + kChannels, p.dim), worker);
  });
}

}  // namespace lcore::cpu::LCORE_ISA
