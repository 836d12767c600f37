// Gradients of the causal convolution. With s the sum before the activation (computed again) and ds = dout act'(s):
//   dx_t = sum_w weight[w] ds_(t + width - 1 - w),  dweight[w] = sum_t ds_t x_(t - width + 1 + w),  dbias = sum_t ds_t.
// dx is the convolution of ds with the taps reversed, on a tile that begins width - 1 steps early: at the first chunk
// of a sequence those steps are its initial state. A chunk also computes the ds of the width - 1 steps behind it, so it
// needs nothing from the next one. Sums over time of a run of chunks are added up over the runs, in order.
#include "core/executor.h"
#include "cpu/causal_conv1d/conv.h"
#include "cpu/kernels.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int kSums = kMaxConvWidth + 1;  // dweight of each tap, and dbias

// A convolution from tile to tile, compiled once for each width.
template <class T, int kUnit>
[[gnu::noinline]] void convolve_tile(const T* tile, int width, const Vec<T>* weights, Vec<T> bias, int64_t count,
                                     T* out) {
  convolve_width<T, kUnit>(tile, width, weights, bias, count, [out](int64_t i, Vec<T> sum) { store(out + i, sum); });
}

template <class T>
struct Tiles {
  T *x, *dfinal, *ds, *dx;  // x and ds from width - 1 steps before the chunk to width - 1 behind it
};

// ds of a chunk and of what follows it in its sequence; zero before the chunk and behind the sequence.
template <class T, bool kRow>
void load_slopes(const CausalConv1dGradParams& g, const Series& dout, int channels, int steps, int more,
                 const Vec<T>* weights, Vec<T> bias, const Tiles<T>& tiles) {
  using Tile = ConvTile<T, kRow>;
  const CausalConv1dParams& p = g.forward;
  const int before = p.width - 1;
  T* ds = tiles.ds + before * Tile::kUnit;
  std::fill_n(tiles.ds, before * Tile::kUnit, T{0});
  Tile::load(dout, channels, steps + more, ds);
  if (p.silu) {
    const int64_t count = (steps + more) * Tile::kUnit;
    convolve_tile<T, Tile::kUnit>(tiles.x, p.width, weights, bias, count, tiles.dx);
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> s = load(tiles.dx + i);
      store(ds + i, load(ds + i) * silu_slope<T>(s, sigmoid<T>(s)));
    }
  }
  std::fill_n(ds + (steps + more) * Tile::kUnit, (before - more) * Tile::kUnit + kLanes<T>, T{0});
}

// Adds the products over the steps of a chunk; registers past the steps count for nothing, whatever x holds there.
template <class T, int kUnit>
void add_products(const Tiles<T>& tiles, int width, int steps, Vec<T>* sums) {
  const T* ds = tiles.ds + (width - 1) * kUnit;
  const int64_t size = int64_t{steps} * kUnit, whole = size / kLanes<T> * kLanes<T>;
  const auto add = [&](int64_t i, Vec<T> slope, const auto& input) {
    for (int w = 0; w < width; ++w) sums[w] += slope * input(i + w * kUnit);
    sums[kMaxConvWidth] += slope;
  };
  for (int64_t i = 0; i < whole; i += kLanes<T>) add(i, load(ds + i), [&](int64_t k) { return load(tiles.x + k); });
  if (whole == size) return;
  const auto rest = [&](const T* from) {
    Vec<T> v{};
    for (int64_t k = 0; k < size - whole; ++k) v[k] = from[k];
    return v;
  };
  add(whole, rest(ds + whole), [&](int64_t k) { return rest(tiles.x + k); });
}

template <class T, bool kRow>
void run_chunk(const CausalConv1dGradParams& g, int64_t row, int64_t channel, int channels, const Chunk& chunk,
               int64_t since, int more, const Vec<T>* weights, Vec<T> bias, const Tiles<T>& tiles, Vec<T>* sums) {
  using Tile = ConvTile<T, kRow>;
  constexpr int kUnit = Tile::kUnit;
  const CausalConv1dParams& p = g.forward;
  const int before = p.width - 1, steps = chunk.steps;
  load_inputs<T, kRow>(p, row, channel, channels, chunk, steps + more, since, tiles.x);
  load_slopes<T, kRow>(g, at(g.dout, row, channel, chunk.begin), channels, steps, more, weights, bias, tiles);
  add_products<T, kUnit>(tiles, p.width, steps, sums);
  Vec<T> reversed[kMaxConvWidth];
  for (int w = 0; w < p.width; ++w) reversed[w] = weights[p.width - 1 - w];
  convolve_tile<T, kUnit>(tiles.ds, p.width, reversed, Vec<T>{}, (before + steps) * kUnit, tiles.dx);
  if (g.dfinal.data != nullptr && more < before) {
    // Of the final state's columns the first `held` are steps up to this chunk's end.
    const int held = before - more;
    Tile::load(conv_state(g.dfinal, row + chunk.sequence, channel, p), channels, before, tiles.dfinal);
    T* dx = tiles.dx + (steps + before - held) * kUnit;
    for (int i = 0; i < held * kUnit; ++i) dx[i] += tiles.dfinal[i];
  }
  Tile::save(tiles.dx + before * kUnit, channels, steps, at(g.dx, row, channel, chunk.begin));
  if (chunk.first && g.dinitial.data != nullptr && before > 0) {
    Tile::save(tiles.dx, channels, before, conv_state(g.dinitial, row + chunk.sequence, channel, p));
  }
}

template <class T, bool kRow>
void run(const CausalConv1dGradParams& g, Executor& executor) {
  using Tile = ConvTile<T, kRow>;
  const CausalConv1dParams& p = g.forward;
  const ConvRuns runs(p.sequences, Tile::kBlock, Tile::kRun);
  const int64_t tile_size = Tile::size(Tile::kBlock + 3 * kMaxConvWidth);
  const Scratch scratch(bytes_of<T>(4 * tile_size), executor.workers());
  // [batch][runs][dim][kSums]
  const Scratch partial(bytes_of<T>(p.dim * kSums), static_cast<int>(p.sequences.batch * runs.count()));
  for_each_conv_item<Tile>(p, runs, executor, [&](int64_t row, int64_t run, int64_t first, int64_t last, int worker) {
    T* base = scratch.of<T>(worker);
    const Tiles<T> tiles{base, base + tile_size, base + 2 * tile_size, base + 3 * tile_size};
    T* to = partial.of<T>(row * runs.count() + run);
    for (int64_t channel = first; channel < last; channel += Tile::kUnit) {
      const int channels = static_cast<int>(std::min<int64_t>(Tile::kUnit, last - channel));
      Vec<T> weights[kMaxConvWidth], bias{}, sums[kSums] = {};
      for (int w = 0; w < p.width; ++w) {
        weights[w] = Tile::parameter(static_cast<const T*>(p.weight) + channel * p.width + w, p.width, channels);
      }
      if (p.bias != nullptr) bias = Tile::parameter(static_cast<const T*>(p.bias) + channel, 1, channels);
      for (int64_t i = runs.begin_of(run); i < runs.ends[run]; ++i) {
        const Chunk& chunk = runs.chunks[i];
        // Chunks of a sequence follow each other: how many of the next width - 1 steps are its own.
        int64_t more = 0;
        for (int64_t k = i + 1; !runs.chunks[k - 1].last && more < p.width - 1; ++k) more += runs.chunks[k].steps;
        run_chunk<T, kRow>(g, row, channel, channels, chunk, chunk.begin - runs.begins[i],
                           static_cast<int>(std::min<int64_t>(more, p.width - 1)), weights, bias, tiles, sums);
      }
      for (int i = 0; i < channels; ++i) {
        for (int k = 0; k < kSums; ++k) {
          to[(channel + i) * kSums + k] = kRow ? reduce_add<T>(sums[k]) : sums[k][i];
        }
      }
    }
  });
  executor.run(p.dim, [&](int64_t channel, int) {
    double sums[kSums] = {};
    for (int64_t run = 0; run < p.sequences.batch * runs.count(); ++run) {
      for (int k = 0; k < kSums; ++k) sums[k] += partial.of<T>(run)[channel * kSums + k];
    }
    for (int w = 0; w < p.width; ++w) static_cast<T*>(g.dweight)[channel * p.width + w] = static_cast<T>(sums[w]);
    if (g.dbias != nullptr) static_cast<T*>(g.dbias)[channel] = static_cast<T>(sums[kMaxConvWidth]);
  });
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dGradParams& g, Executor& executor) {
  const bool by_channel = g.forward.x.channel == 1 && g.forward.dim > 1;
  if (g.forward.is_double) return by_channel ? run<double, false>(g, executor) : run<double, true>(g, executor);
  return by_channel ? run<float, false>(g, executor) : run<float, true>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
