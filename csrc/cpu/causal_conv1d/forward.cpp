// Causal depthwise convolution: out_t = act(bias + sum_w weight[w] x_(t - width + 1 + w)), what stands before a
// sequence being its state. A chunk of steps and the width - 1 before it are widened into a tile in L1 (conv.h), so a
// chunk needs nothing from the one before and any worker may take it.
#include "core/executor.h"
#include "cpu/causal_conv1d/conv.h"
#include "cpu/kernels.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T>
struct Taps {
  Vec<T> weights[kMaxConvWidth];
  Vec<T> bias{};
};

// A chunk from its inputs into `out`, in one pass where the output is contiguous in whole registers; otherwise, and for
// what is left of a row, through `rest`.
template <class T, bool kRow>
void convolve_chunk(const CausalConv1dParams& p, const T* inputs, const Taps<T>& taps, int channels, int steps,
                    const Series& out, T* rest) {
  using Tile = ConvTile<T, kRow>;
  constexpr int kUnit = Tile::kUnit;
  const bool silu_after = p.silu;
  const auto act = [silu_after](Vec<T> v) { return silu_after ? silu<T>(v) : v; };
  int64_t whole = 0;
  with_type(out.data, out.type, [&](const auto* typed) {
    using Element = std::remove_cvref_t<decltype(*typed)>;
    if constexpr (kLoadsVectors<T, Element>) {
      auto* dst = const_cast<Element*>(typed);
      if (kRow ? out.step != 1 : out.channel != 1 || channels != kUnit) return;
      whole = steps * kUnit / kLanes<T> * kLanes<T>;
      const int64_t stride = kRow ? kLanes<T> : out.step;
      convolve_width<T, kUnit>(inputs, p.width, taps.weights, taps.bias, whole,
                               [=](int64_t i, Vec<T> sum) __attribute__((always_inline)) {
                                 store_as<T>(dst + i / kLanes<T> * stride, act(sum));
                               });
    }
  });
  if (whole == steps * kUnit) return;
  convolve_width<T, kUnit>(inputs + whole, p.width, taps.weights, taps.bias, steps * kUnit - whole,
                           [&](int64_t i, Vec<T> sum) { store(rest + i, act(sum)); });
  Tile::save(rest, channels, steps - static_cast<int>(whole / kUnit), at(out, 0, 0, whole / kUnit));
}

template <class T, bool kRow>
void run(const CausalConv1dParams& p, Executor& executor) {
  using Tile = ConvTile<T, kRow>;
  // Where the final state replaces the initial one, the last chunk must come after the first.
  const ConvRuns runs(p.sequences, Tile::kBlock, Tile::kRun, p.final.data != nullptr && p.final.data == p.initial.data);
  const int before = p.width - 1;
  const int64_t tile_size = Tile::size(Tile::kBlock + before);
  const Scratch scratch(bytes_of<T>(2 * tile_size), executor.workers());
  for_each_conv_item<Tile>(p, runs, executor, [&](int64_t row, int64_t run, int64_t first, int64_t last, int worker) {
    T *tile = scratch.of<T>(worker), *rest = tile + tile_size;
    for (int64_t channel = first; channel < last; channel += Tile::kUnit) {
      const int channels = static_cast<int>(std::min<int64_t>(Tile::kUnit, last - channel));
      Taps<T> taps;
      for (int w = 0; w < p.width; ++w) {
        taps.weights[w] = Tile::parameter(static_cast<const T*>(p.weight) + channel * p.width + w, p.width, channels);
      }
      if (p.bias != nullptr) taps.bias = Tile::parameter(static_cast<const T*>(p.bias) + channel, 1, channels);
      for (int64_t i = runs.begin_of(run); i < runs.ends[run]; ++i) {
        const Chunk& chunk = runs.chunks[i];
        if (p.initial.slots != nullptr && p.initial.slots[row + chunk.sequence] < 0) continue;
        load_inputs<T, kRow>(p, row, channel, channels, chunk, chunk.steps, chunk.begin - runs.begins[i], tile);
        convolve_chunk<T, kRow>(p, tile, taps, channels, chunk.steps, at(p.out, row, channel, chunk.begin), rest);
        if (chunk.last && p.final.data != nullptr && before > 0) {
          Tile::save(tile + chunk.steps * Tile::kUnit, channels, before,
                     conv_state(p.final, row + chunk.sequence, channel, p));
        }
      }
    }
  });
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p, Executor& executor) {
  const bool by_channel = p.x.channel == 1 && p.dim > 1;
  if (p.is_double) return by_channel ? run<double, false>(p, executor) : run<double, true>(p, executor);
  return by_channel ? run<float, false>(p, executor) : run<float, true>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
