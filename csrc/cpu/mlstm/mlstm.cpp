// The gates of an mLSTM (Beck et al. 2024, xLSTM, eqs. 19-27): with l_t = log sigmoid(f_t)
//   m_t = max(l_t + m_(t-1), i_t),  C_t = e^(l_t + m_(t-1) - m_t) C_(t-1) + e^(i_t - m_t) k_t v_t^T.
// So an mLSTM is linear attention with the decay e^g, g_t = l_t + m_(t-1) - m_t, and values times e^(i_t - m_t),
// neither above 1. m cancels in the output: g takes in what rounding made of m. Where the final C, n and m are used
// apart, m has a gradient: it goes back along the larger of the two until a step's input gate was the larger. A
// register holds heads.
#include "core/mlstm.h"

#include "core/executor.h"
#include "cpu/channel_tile.h"
#include "cpu/chunks.h"
#include "cpu/decay.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

template <class T>
struct Tiles {
  T *i, *f, *g, *weight, *m;  // [steps][kLanes]
  explicit Tiles(Arena& arena) {
    for (T** tile : {&i, &f, &g, &weight, &m}) *tile = arena.take<T>(kChunk * kLanes<T>);
  }
};

// A register of heads of one row.
struct Heads {
  int64_t row, first;
  int count;
};

inline Series state_of(const States& s, const Heads& heads, int64_t sequence, int64_t stride) {
  const int64_t index = heads.row + sequence, slot = s.slots == nullptr ? index : s.slots[index];
  return at({s.data, s.type, stride, 1, 1}, slot, heads.first, 0);
}

template <class T>
Vec<T> load_state(const States& s, const Heads& heads, int64_t sequence, int64_t stride) {
  alignas(64) T values[kLanes<T>] = {};
  if (s.data != nullptr) load_tile(state_of(s, heads, sequence, stride), heads.count, 1, values);
  return load(values);
}

template <class T>
void store_state(Vec<T> m, const States& s, const Heads& heads, int64_t sequence, int64_t stride) {
  alignas(64) T values[kLanes<T>];
  store(values, m);
  store_tile(values, heads.count, 1, state_of(s, heads, sequence, stride));
}

template <class T>
[[gnu::noinline]] void advance(int steps, Vec<T>& m, const Tiles<T>& tiles) {
  for (int at = 0; at < steps * kLanes<T>; at += kLanes<T>) {
    const Vec<T> i = load(tiles.i + at), l = log_sigmoid<T>(load(tiles.f + at)), next = max<T>(l + m, i);
    store(tiles.g + at, l + (m - next));
    store(tiles.weight + at, decay<false>(i - next, splat(kLog2E<T>)));
    store(tiles.m + at, next);
    m = next;
  }
}

// g and weight hold their gradients, m what it was before each step; i and f become theirs. dm: of m behind the steps.
template <class T>
[[gnu::noinline]] void retreat(int steps, const T* weight, Vec<T>& dm, const Tiles<T>& tiles) {
  for (int at = (steps - 1) * kLanes<T>; at >= 0; at -= kLanes<T>) {
    const Vec<T> i = load(tiles.i + at), f = load(tiles.f + at), decayed = log_sigmoid<T>(f) + load(tiles.m + at);
    const Vec<T> kept = decayed > i ? dm : Vec<T>{};
    store(tiles.i + at, load(tiles.weight + at) * load(weight + at) + (dm - kept));
    store(tiles.f + at, (load(tiles.g + at) + kept) * sigmoid<T>(-f));
    dm = kept;
  }
}

template <class T, class Body>
void for_each_heads(const MlstmGateParams& p, int tiles, Executor& executor, const Body& body) {
  constexpr int kLane = kLanes<T>;
  const int64_t lanes = (p.heads + kLane - 1) / kLane;
  const Scratch scratch(bytes_of<T>(tiles * kChunk * kLane), executor.workers());
  executor.run(p.sequences.batch * lanes, [&](int64_t item, int worker) {
    const int64_t first = item % lanes * kLane;
    body(Heads{item / lanes, first, static_cast<int>(std::min<int64_t>(kLane, p.heads - first))}, scratch.of(worker));
  });
}

template <class T>
void run(const MlstmGateParams& p, Executor& executor) {
  const std::vector<Chunk> chunks = chunks_of(p.sequences);
  for_each_heads<T>(p, 5, executor, [&](const Heads& heads, char* scratch) {
    Arena arena(scratch);
    const Tiles<T> tiles(arena);
    Vec<T> m{};
    for (const Chunk& chunk : chunks) {
      if (p.initial.slots != nullptr && p.initial.slots[heads.row + chunk.sequence] < 0) continue;
      if (chunk.first) m = load_state<T>(p.initial, heads, chunk.sequence, p.heads);
      const auto here = [&](const Series& s) { return at(s, heads.row, heads.first, chunk.begin); };
      load_tile(here(p.i), heads.count, chunk.steps, tiles.i);
      load_tile(here(p.f), heads.count, chunk.steps, tiles.f);
      advance(chunk.steps, m, tiles);
      store_tile(tiles.g, heads.count, chunk.steps, here(p.g));
      store_tile(tiles.weight, heads.count, chunk.steps, here(p.weight));
      store_tile(tiles.m, heads.count, chunk.steps, here(p.m));
      if (chunk.last) store_state<T>(m, p.final, heads, chunk.sequence, p.heads);
    }
  });
}

template <class T>
void run(const MlstmGateGradParams& d, Executor& executor) {
  const MlstmGateParams& p = d.forward;
  const std::vector<Chunk> chunks = chunks_of(p.sequences);
  const DType type = p.m.type;
  for_each_heads<T>(p, 6, executor, [&](const Heads& heads, char* scratch) {
    Arena arena(scratch);
    const Tiles<T> tiles(arena);
    T* weight = arena.take<T>(kChunk * kLanes<T>);
    Vec<T> dm{};
    for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
      const int steps = chunk->steps;
      if (chunk->last) dm = load_state<T>({d.dm, type, nullptr}, heads, chunk->sequence, p.heads);
      const auto here = [&](const Series& s) { return at(s, heads.row, heads.first, chunk->begin); };
      load_tile(here(p.i), heads.count, steps, tiles.i);
      load_tile(here(p.f), heads.count, steps, tiles.f);
      load_tile(here(d.dg), heads.count, steps, tiles.g);
      load_tile(here(d.dweight), heads.count, steps, tiles.weight);
      load_tile(here(p.weight), heads.count, steps, weight);
      if (chunk->first) {
        store(tiles.m, load_state<T>(p.initial, heads, chunk->sequence, p.heads));
        if (steps > 1) load_tile(here(p.m), heads.count, steps - 1, tiles.m + kLanes<T>);
      } else {
        load_tile(at(here(p.m), 0, 0, -1), heads.count, steps, tiles.m);
      }
      retreat(steps, weight, dm, tiles);
      store_tile(tiles.i, heads.count, steps, here(d.di));
      store_tile(tiles.f, heads.count, steps, here(d.df));
      if (chunk->first && d.dm_initial != nullptr) {
        store_state<T>(dm, {d.dm_initial, type, nullptr}, heads, chunk->sequence, p.heads);
      }
    }
  });
}

}  // namespace

void mlstm_gates(const MlstmGateParams& p, Executor& executor) {
  if (p.is_double) return run<double>(p, executor);
  return run<float>(p, executor);
}

void mlstm_gates_backward(const MlstmGateGradParams& d, Executor& executor) {
  if (d.forward.is_double) return run<double>(d, executor);
  return run<float>(d, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
