// Selective scan (Gu & Dao 2023, Mamba, eq. 2 and section 3.3), for each channel over its states n:
//   h_t[n] = e^(delta_t A[n]) h_(t-1)[n] + delta_t u_t B_t[n],  y_t = sum_n C_t[n] h_t[n] + D u_t,  out_t = y_t
//   silu(z_t).
// A register holds channels: no sum runs across its lanes, B and C are broadcast, and any number of states fits. States
// are advanced a few at a time through a chunk of steps, in registers; what the chunk needs lies in L1.
// Time runs in order from the state of the step before, so a sequence may be cut anywhere without a change of bits.
#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/selective_scan/scan.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kMaxLanes = 8;        // registers of channels an item: they share a chunk's B and C
constexpr int64_t kItemsPerWorker = 4;  // for balance

// kCount states through the steps of a chunk. Not inlined: there would be no registers left for it.
template <class T, int kCount, bool kBounded>
__attribute__((noinline)) void advance(const T* __restrict delta, const T* __restrict delta_u, int steps,
                                       const T* __restrict b, const T* __restrict c, const T* __restrict rates,
                                       T* __restrict states, T* __restrict y) {
  constexpr int kLane = kLanes<T>;
  Vec<T> rate[kCount], h[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    rate[i] = load(rates + i * kLane);
    h[i] = load(states + i * kLane);
  }
  for (int t = 0; t < steps; ++t) {
    const Vec<T> step = load(delta + t * kLane), input = load(delta_u + t * kLane);
    Vec<T> sum = load(y + t * kLane);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      h[i] = decay<kBounded>(step, rate[i]) * h[i] + input * b[t * kLane + i];
      sum += h[i] * c[t * kLane + i];
    }
    store(y + t * kLane, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(states + i * kLane, h[i]);
}

template <class T>
struct Tiles {
  static constexpr int64_t kTile = kChunk * kLanes<T>;
  Tiles(Arena arena, int states, int64_t lanes)
      : b{arena.take<T>(StateSteps<T>::size(states))},
        c{arena.take<T>(StateSteps<T>::size(states))},
        rates(arena.take<T>(lanes * states * kLanes<T>)),
        states(arena.take<T>(lanes * states * kLanes<T>)),
        delta(arena.take<T>(kTile)),
        u(arena.take<T>(kTile)),
        y(arena.take<T>(kTile)),
        z(arena.take<T>(kTile)),
        bounds(arena.take<T>(lanes * kLanes<T>)),
        bytes(arena.used()) {}
  StateSteps<T> b, c;
  T *rates, *states;  // [lanes][states][kLanes]
  T *delta, *u, *y, *z;
  T* bounds;  // [lanes][kLanes]
  int64_t bytes;
};

template <class T>
void scan_chunk(const SelectiveScanParams& p, int64_t row, const Lane& lane, const Chunk& chunk, const Tiles<T>& tiles,
                const T* rates, Vec<T> bound, T* states) {
  const int size = chunk.steps * kLanes<T>;
  const bool bounded = load_delta<T>(p, row, lane, chunk, bound, tiles.delta, nullptr);
  load_tile(at(p.u, row, lane.first, chunk.begin), lane.count, chunk.steps, tiles.u);
  const Vec<T> skip = load_parameter<T>(p.d, lane);
  for (int i = 0; i < size; i += kLanes<T>) {
    const Vec<T> u = load(tiles.u + i);
    store(tiles.y + i, p.d == nullptr ? Vec<T>{} : skip * u);
    store(tiles.u + i, load(tiles.delta + i) * u);
  }
  with_bound(bounded, [&]<bool kBounded>() {
    for_each_run<kStates<T>>(0, p.states, [&]<int kCount>(int n) {
      advance<T, kCount, kBounded>(tiles.delta, tiles.u, chunk.steps, tiles.b.of(n), tiles.c.of(n),
                                   rates + n * kLanes<T>, states + n * kLanes<T>, tiles.y);
    });
  });
  if (p.z.data != nullptr) {
    load_tile(at(p.z, row, lane.first, chunk.begin), lane.count, chunk.steps, tiles.z);
    for (int i = 0; i < size; i += kLanes<T>) store(tiles.y + i, load(tiles.y + i) * silu<T>(load(tiles.z + i)));
  }
  store_tile(tiles.y, lane.count, chunk.steps, at(p.out, row, lane.first, chunk.begin));
}

// All chunks of a row, for `count` registers of channels from `begin` on.
template <class T>
void scan_row(const SelectiveScanParams& p, const std::vector<Chunk>& chunks, int64_t row, int64_t group, int64_t begin,
              int64_t count, const Tiles<T>& tiles) {
  const int64_t slots = slots_a_row(p.sequences), ld = p.states * kLanes<T>;
  for (const Chunk& chunk : chunks) {
    if (p.initial.slots != nullptr && p.initial.slots[row + chunk.sequence] < 0) continue;
    tiles.b.load(p.b, p.b_group, row, group, chunk, p.states);
    tiles.c.load(p.c, p.c_group, row, group, chunk, p.states);
    for (int64_t i = 0; i < count; ++i) {
      const Lane lane = lane_of<T>(p, group, begin + i);
      T* states = tiles.states + i * ld;
      if (chunk.first && p.initial.data == nullptr) std::fill_n(states, ld, T{0});
      if (chunk.first && p.initial.data != nullptr) load_states(p.initial, row + chunk.sequence, lane, p, states);
      if (p.checkpoints != nullptr) {
        T* to = static_cast<T*>(p.checkpoints) + (row * slots + chunk.slot) * p.states * p.dim;
        store_tile(states, lane.count, p.states, at({to, type_of<T>(), 0, 1, p.dim}, 0, lane.first, 0));
      }
      scan_chunk(p, row, lane, chunk, tiles, tiles.rates + i * ld, load(tiles.bounds + i * kLanes<T>), states);
      if (chunk.last && p.final.data != nullptr) store_states(states, p.final, row + chunk.sequence, lane, p);
    }
  }
}

template <class T>
void run(const SelectiveScanParams& p, Executor& executor) {
  const std::vector<Chunk> chunks = chunks_of(p.sequences);
  // Short rows go several to an item, which prepares its rates once for all of them.
  const int64_t rows = kChunk / std::clamp<int64_t>(p.sequences.steps, 1, kChunk);
  const int64_t row_items = (p.sequences.batch + rows - 1) / rows, per_group = lanes_a_group<T>(p);
  const int64_t all = row_items * p.groups * per_group;
  const int64_t lanes = std::clamp<int64_t>(all / (kItemsPerWorker * executor.workers()), 1, kMaxLanes);
  const int64_t lane_items = (per_group + lanes - 1) / lanes;
  const Scratch scratch(Tiles<T>(Arena(nullptr), p.states, lanes).bytes, executor.workers());
  executor.run(row_items * p.groups * lane_items, [&](int64_t item, int worker) {
    const Tiles<T> tiles(Arena(scratch.of(worker)), p.states, lanes);
    const int64_t group = item / lane_items % p.groups, begin = item % lane_items * lanes;
    const int64_t count = std::min(lanes, per_group - begin), first = item / lane_items / p.groups * rows;
    for (int64_t i = 0; i < count; ++i) {
      T* rates = tiles.rates + i * p.states * kLanes<T>;
      store(tiles.bounds + i * kLanes<T>, load_rates(p, lane_of<T>(p, group, begin + i), rates));
    }
    for (int64_t row = first; row < std::min(first + rows, p.sequences.batch); ++row) {
      scan_row(p, chunks, row, group, begin, count, tiles);
    }
  });
}

}  // namespace

void selective_scan(const SelectiveScanParams& p, Executor& executor) {
  if (p.is_double) return run<double>(p, executor);
  return run<float>(p, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
