// Gradients of the selective scan, by a recurrence that runs back from the last step (dy = dout silu(z)):
//   dh_t = C_t dy_t + a_(t+1) dh_(t+1),  a_t = e^(delta_t A),  s_t = <dh_t, B_t>,  q_t = dh_t a_t h_(t-1):
//   du = D dy + delta s,  ddelta = u s + <q, A>,  dA = sum_t delta q,  dB = sum_d delta u dh,  dC = sum_d dy h,
//   dD = sum dy u,  d initial = a_1 dh_1.  a h_(t-1) is a product, not h_t - delta u B: no cancellation.
// A chunk's states come again from the one kept at its start. A block of 64 channels shares sums over channels of dB
// and dC: a register of them a step and state, added up lane by lane only when the block is through. Blocks write these
// sums of a window of time beside each other and another pass adds them in order: no atomics, one value for any
// threads.
#include <utility>

#include "core/executor.h"
#include "cpu/kernels.h"
#include "cpu/selective_scan/scan.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kBlockChannels = 64;
// Steps whose sums of blocks are held at once: as many as fit, for the passes are worth waking threads for.
constexpr int64_t kWindow = 2048;
constexpr int64_t kWindowBytes = int64_t{64} << 20;

template <class T>
inline constexpr int64_t kBlockLanes = kBlockChannels / kLanes<T>;

// States at once: their decays and values over a chunk, and the sums of dB and dC, fit L1 together.
template <class T>
inline constexpr int kGradStates = std::min(4, kLanes<T>);

// What one register of channels carries from chunk to chunk. Sums over time are double: a chunk adds up in T.
template <class T>
struct Carry {
  Carry(Arena arena, int states)
      : dh(arena.take<T>(states * kLanes<T>)),
        da(arena.take<double>(states * kLanes<T>)),
        dd(arena.take<double>(kLanes<T>)),
        dbias(arena.take<double>(kLanes<T>)),
        bytes(arena.used()) {}
  T* dh;
  double *da, *dd, *dbias;
  int64_t bytes;
};

// Tiles of a chunk for one register of channels.
template <class T>
struct LaneTiles {
  T *delta, *slope, *u, *delta_u, *z, *dout, *dy, *y, *sum_b, *sum_a;
  bool bounded;  // delta: see load_delta
};

template <class T>
struct Tiles {
  static constexpr int64_t kTile = kChunk * kLanes<T>;
  Tiles(Arena arena, int states)
      : b{arena.take<T>(StateSteps<T>::size(states))},
        c{arena.take<T>(StateSteps<T>::size(states))},
        rates(arena.take<T>(kBlockLanes<T> * states * kLanes<T>)),
        a(arena.take<T>(kBlockLanes<T> * states * kLanes<T>)),
        decays(arena.take<T>(kGradStates<T> * kTile)),
        values(arena.take<T>(kGradStates<T> * (kTile + kLanes<T>))),
        db(arena.take<T>(kGradStates<T> * kTile)),
        dc(arena.take<T>(kGradStates<T> * kTile)) {
    for (LaneTiles<T>& lane : lanes) {
      for (T** tile : {&lane.delta, &lane.slope, &lane.u, &lane.delta_u, &lane.z, &lane.dout, &lane.dy, &lane.y,
                       &lane.sum_b, &lane.sum_a}) {
        *tile = arena.take<T>(kTile);
      }
    }
    bytes = arena.used();
  }
  StateSteps<T> b, c;
  T *rates, *a;  // [kBlockLanes][states][kLanes]
  T* decays;     // [kChunk][count][kLanes]
  T* values;     // one step more: from the value before the chunk on
  T *db, *dc;    // [count][kChunk][kLanes]
  LaneTiles<T> lanes[kBlockLanes<T>];
  int64_t bytes;
};

// The forward of kCount states again, from values[0]; y only where it is asked for.
template <class T, int kCount, bool kBounded>
__attribute__((noinline)) void replay(const LaneTiles<T>& tile, int steps, const T* __restrict b, const T* __restrict c,
                                      const T* __restrict rates, T* __restrict decays, T* __restrict values,
                                      T* __restrict y) {
  constexpr int kLane = kLanes<T>;
  Vec<T> rate[kCount], h[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    rate[i] = load(rates + i * kLane);
    h[i] = load(values + i * kLane);
  }
  for (int t = 0; t < steps; ++t) {
    const Vec<T> step = load(tile.delta + t * kLane), input = load(tile.delta_u + t * kLane);
    Vec<T> sum = y == nullptr ? Vec<T>{} : load(y + t * kLane);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec<T> factor = decay<kBounded>(step, rate[i]);
      h[i] = factor * h[i] + input * b[t * kLane + i];
      sum += h[i] * c[t * kLane + i];
      store(decays + (t * kCount + i) * kLane, factor);
      store(values + ((t + 1) * kCount + i) * kLane, h[i]);
    }
    if (y != nullptr) store(y + t * kLane, sum);
  }
}

// The recurrence of the gradients through a chunk, for kCount states of one register of channels.
template <class T, int kCount>
__attribute__((noinline)) void retreat(const LaneTiles<T>& tile, int steps, const T* __restrict b,
                                       const T* __restrict c, const T* __restrict a, const T* __restrict decays,
                                       const T* __restrict values, T* __restrict dh_states, T* __restrict db,
                                       T* __restrict dc, T* __restrict da_sums) {
  constexpr int kLane = kLanes<T>;
  Vec<T> dh[kCount], da[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    dh[i] = load(dh_states + i * kLane);
    da[i] = Vec<T>{};
  }
  for (int t = steps - 1; t >= 0; --t) {
    const Vec<T> step = load(tile.delta + t * kLane), input = load(tile.delta_u + t * kLane);
    const Vec<T> dy = load(tile.dy + t * kLane);
    Vec<T> sum_b = load(tile.sum_b + t * kLane), sum_a = load(tile.sum_a + t * kLane);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const T* value = values + (t * kCount + i) * kLane;
      T *to_b = db + (i * kChunk + t) * kLane, *to_c = dc + (i * kChunk + t) * kLane;
      const Vec<T> factor = load(decays + (t * kCount + i) * kLane);
      dh[i] += dy * c[t * kLane + i];
      sum_b += dh[i] * b[t * kLane + i];
      const Vec<T> slope = dh[i] * (factor * load(value));
      sum_a += slope * load(a + i * kLane);
      da[i] += step * slope;
      store(to_b, load(to_b) + input * dh[i]);
      store(to_c, load(to_c) + dy * load(value + kCount * kLane));
      dh[i] *= factor;
    }
    store(tile.sum_b + t * kLane, sum_b);
    store(tile.sum_a + t * kLane, sum_a);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    store(dh_states + i * kLane, dh[i]);
    store(da_sums + i * kLane, da[i]);
  }
}

// Everything that an item needs to know of the whole.
template <class T>
struct Job {
  const SelectiveScanGradParams& g;
  const SelectiveScanParams& p = g.forward;
  std::vector<Chunk> chunks = chunks_of(p.sequences);
  int64_t slots = slots_a_row(p.sequences);
  int64_t per_group = lanes_a_group<T>(p);
  int64_t blocks = (per_group + kBlockLanes<T> - 1) / kBlockLanes<T>;
  Scratch carries{Carry<T>(Arena(nullptr), p.states).bytes, static_cast<int>(p.sequences.batch * p.groups * per_group)};
  int64_t items = p.sequences.batch * p.groups * blocks;
  int64_t window = std::clamp(kWindowBytes / bytes_of<T>(2 * p.states * std::max<int64_t>(items, 1)), kChunk, kWindow);
  // Sums over a block's channels of dB and dC: [batch][groups][blocks][dB, dC][states][window]
  Scratch partial{bytes_of<T>(2 * p.states * window), static_cast<int>(items)};

  Carry<T> carry(int64_t row, int64_t group, int64_t lane) const {
    return {Arena(carries.of((row * p.groups + group) * per_group + lane)), p.states};
  }
};

template <class T>
void add_lanes(double* to, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) to[i] += v[i];
}

template <class T>
void prepare(const Job<T>& job, int64_t row, const Lane& lane, const Chunk& chunk, Vec<T> bound, LaneTiles<T>& tile,
             const Carry<T>& carry) {
  const SelectiveScanParams& p = job.p;
  const int size = chunk.steps * kLanes<T>;
  const bool gated = p.z.data != nullptr;
  tile.bounded = load_delta<T>(p, row, lane, chunk, bound, tile.delta, tile.slope);
  load_tile(at(p.u, row, lane.first, chunk.begin), lane.count, chunk.steps, tile.u);
  load_tile(at(job.g.dout, row, lane.first, chunk.begin), lane.count, chunk.steps, tile.dout);
  if (gated) load_tile(at(p.z, row, lane.first, chunk.begin), lane.count, chunk.steps, tile.z);
  const Vec<T> skip = load_parameter<T>(p.d, lane);
  for (int i = 0; i < size; i += kLanes<T>) {
    const Vec<T> u = load(tile.u + i), dout = load(tile.dout + i);
    store(tile.delta_u + i, load(tile.delta + i) * u);
    store(tile.dy + i, gated ? dout * silu<T>(load(tile.z + i)) : dout);
    store(tile.y + i, p.d == nullptr ? Vec<T>{} : skip * u);
    store(tile.sum_b + i, Vec<T>{});
    store(tile.sum_a + i, Vec<T>{});
  }
  if (!chunk.last) return;
  std::fill_n(carry.dh, p.states * kLanes<T>, T{0});
  if (job.g.dfinal != nullptr) {
    load_states(States{job.g.dfinal, type_of<T>(), nullptr}, row + chunk.sequence, lane, p, carry.dh);
  }
}

template <class T>
void finish(const Job<T>& job, int64_t row, const Lane& lane, const Chunk& chunk, const LaneTiles<T>& tile,
            const Carry<T>& carry) {
  const SelectiveScanGradParams& g = job.g;
  const Vec<T> skip = load_parameter<T>(job.p.d, lane);
  Vec<T> dd{}, dbias{};
  for (int i = 0; i < chunk.steps * kLanes<T>; i += kLanes<T>) {
    const Vec<T> u = load(tile.u + i), dy = load(tile.dy + i), sum_b = load(tile.sum_b + i);
    const Vec<T> ddelta = (u * sum_b + load(tile.sum_a + i)) * load(tile.slope + i);
    const Vec<T> du = load(tile.delta + i) * sum_b;
    if (g.dz.data != nullptr) {
      const Vec<T> z = load(tile.z + i);
      store(tile.z + i, load(tile.dout + i) * load(tile.y + i) * silu_slope<T>(z, sigmoid<T>(z)));
    }
    store(tile.u + i, job.p.d == nullptr ? du : du + skip * dy);
    store(tile.delta + i, ddelta);
    dd += dy * u;
    dbias += ddelta;
  }
  add_lanes<T>(carry.dd, dd);
  add_lanes<T>(carry.dbias, dbias);
  store_tile(tile.u, lane.count, chunk.steps, at(g.du, row, lane.first, chunk.begin));
  store_tile(tile.delta, lane.count, chunk.steps, at(g.ddelta, row, lane.first, chunk.begin));
  if (g.dz.data != nullptr) store_tile(tile.z, lane.count, chunk.steps, at(g.dz, row, lane.first, chunk.begin));
  if (chunk.first && g.dinitial != nullptr) {
    store_states(carry.dh, States{g.dinitial, type_of<T>(), nullptr}, row + chunk.sequence, lane, job.p);
  }
}

// Chunks [first, last) of a row, backwards, for a block of channels.
template <class T>
void run_block(const Job<T>& job, int64_t first, int64_t last, int64_t item, Tiles<T> tiles) {
  const SelectiveScanParams& p = job.p;
  const int64_t block = item % job.blocks, group = item / job.blocks % p.groups, row = item / job.blocks / p.groups;
  const int64_t begin = block * kBlockLanes<T>, count = std::min(kBlockLanes<T>, job.per_group - begin);
  const int64_t ld = p.states * kLanes<T>, start = job.chunks[first].begin;
  T* partial = job.partial.template of<T>(item);
  Vec<T> bounds[kBlockLanes<T>];
  for (int64_t i = 0; i < count; ++i) {
    const Lane lane = lane_of<T>(p, group, begin + i);
    bounds[i] = load_rates(p, lane, tiles.rates + i * ld);
    load_states(States{p.a, type_of<T>(), nullptr}, 0, lane, p, tiles.a + i * ld);
  }
  for (int64_t index = last - 1; index >= first; --index) {
    const Chunk& chunk = job.chunks[index];
    const int steps = chunk.steps;
    const T* kept = static_cast<const T*>(p.checkpoints) + (row * job.slots + chunk.slot) * p.states * p.dim;
    tiles.b.load(p.b, p.b_group, row, group, chunk, p.states);
    tiles.c.load(p.c, p.c_group, row, group, chunk, p.states);
    for (int64_t i = 0; i < count; ++i) {
      const Lane lane = lane_of<T>(p, group, begin + i);
      prepare(job, row, lane, chunk, bounds[i], tiles.lanes[i], job.carry(row, group, begin + i));
    }
    for_each_run<kGradStates<T>>(0, p.states, [&]<int kCount>(int n) {
      std::fill_n(tiles.db, kCount * Tiles<T>::kTile, T{0});
      std::fill_n(tiles.dc, kCount * Tiles<T>::kTile, T{0});
      for (int64_t i = 0; i < count; ++i) {
        const Lane lane = lane_of<T>(p, group, begin + i);
        const Carry<T> carry = job.carry(row, group, begin + i);
        const T *b = tiles.b.of(n), *c = tiles.c.of(n);
        load_tile(at({kept, type_of<T>(), 0, 1, p.dim}, 0, lane.first, n), lane.count, kCount, tiles.values);
        with_bound(tiles.lanes[i].bounded, [&]<bool kBounded>() {
          replay<T, kCount, kBounded>(tiles.lanes[i], steps, b, c, tiles.rates + i * ld + n * kLanes<T>, tiles.decays,
                                      tiles.values, job.g.dz.data == nullptr ? nullptr : tiles.lanes[i].y);
        });
        alignas(64) T da[kCount * kLanes<T>];
        retreat<T, kCount>(tiles.lanes[i], steps, b, c, tiles.a + i * ld + n * kLanes<T>, tiles.decays, tiles.values,
                           carry.dh + n * kLanes<T>, tiles.db, tiles.dc, da);
        for (int k = 0; k < kCount; ++k) add_lanes<T>(carry.da + (n + k) * kLanes<T>, load(da + k * kLanes<T>));
      }
      for (int k = 0; k < kCount; ++k) {
        T* sums = partial + (n + k) * job.window + chunk.begin - start;
        sum_lanes(tiles.db + k * Tiles<T>::kTile, steps, sums);
        sum_lanes(tiles.dc + k * Tiles<T>::kTile, steps, sums + p.states * job.window);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      finish(job, row, lane_of<T>(p, group, begin + i), chunk, tiles.lanes[i], job.carry(row, group, begin + i));
    }
  }
}

// dB or dC of one state in a window: the sums of the group's blocks, in order.
template <class T>
void add_blocks(const Job<T>& job, int64_t begin, int steps, int64_t item, T* sums) {
  const SelectiveScanParams& p = job.p;
  const int64_t of_block = item % (2 * p.states), owner = item / (2 * p.states);
  const auto block = [&](int64_t i) {
    return job.partial.template of<T>(owner * job.blocks + i) + of_block * job.window;
  };
  std::copy_n(block(0), steps, sums);
  for (int64_t i = 1; i < job.blocks; ++i) {
    const T* more = block(i);
    for (int t = 0; t < steps; ++t) sums[t] += more[t];
  }
  const Series& to = of_block < p.states ? job.g.db : job.g.dc;
  const Series row = at(to, owner / p.groups, owner % p.groups * p.states + of_block % p.states, begin);
  store_row(sums, steps, const_cast<void*>(row.data), row.type);
}

// A channel's sums over time, added up over the rows of the batch in order.
template <class T, class Sums>
void add_rows(const Job<T>& job, int64_t group, int64_t index, void* to, int values, const Sums& sums) {
  if (to == nullptr) return;
  const Lane lane = lane_of<T>(job.p, group, index);
  for (int n = 0; n < values; ++n) {
    for (int i = 0; i < lane.count; ++i) {
      double sum = 0;
      for (int64_t row = 0; row < job.p.sequences.batch; ++row) {
        sum += sums(job.carry(row, group, index))[n * kLanes<T> + i];
      }
      static_cast<T*>(to)[(lane.first + i) * values + n] = static_cast<T>(sum);
    }
  }
}

template <class T>
void run(const SelectiveScanGradParams& g, Executor& executor) {
  const Job<T> job{g};
  const SelectiveScanParams& p = job.p;
  const int64_t owners = p.sequences.batch * p.groups;
  for (int64_t lane = 0; lane < owners * job.per_group; ++lane) {
    const Carry<T> carry(Arena(job.carries.of(lane)), p.states);
    std::fill_n(carry.da, p.states * kLanes<T>, 0.0);
    std::fill_n(carry.dd, kLanes<T>, 0.0);
    std::fill_n(carry.dbias, kLanes<T>, 0.0);
  }
  const Scratch scratch(Tiles<T>(Arena(nullptr), p.states).bytes, executor.workers());
  for (int64_t last = static_cast<int64_t>(job.chunks.size()), first; last > 0; last = first) {
    const int64_t end = job.chunks[last - 1].begin + job.chunks[last - 1].steps;
    for (first = last - 1; first > 0 && end - job.chunks[first - 1].begin <= job.window;) --first;
    const int64_t begin = job.chunks[first].begin;
    const auto run_item = [&](int64_t item, int worker) {
      run_block(job, first, last, item, Tiles<T>(Arena(scratch.of(worker)), p.states));
    };
    executor.run(owners * job.blocks, run_item);
    const auto add_item = [&](int64_t item, int worker) {
      add_blocks(job, begin, static_cast<int>(end - begin), item, scratch.of<T>(worker));
    };
    executor.run(owners * 2 * p.states, add_item);
  }
  executor.run(p.groups * job.per_group, [&](int64_t item, int) {
    const int64_t group = item / job.per_group, index = item % job.per_group;
    add_rows(job, group, index, g.da, p.states, [](const Carry<T>& c) { return c.da; });
    add_rows(job, group, index, g.dd, 1, [](const Carry<T>& c) { return c.dd; });
    add_rows(job, group, index, g.ddelta_bias, 1, [](const Carry<T>& c) { return c.dbias; });
  });
}

}  // namespace

void selective_scan_backward(const SelectiveScanGradParams& g, Executor& executor) {
  if (g.forward.is_double) return run<double>(g, executor);
  return run<float>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
