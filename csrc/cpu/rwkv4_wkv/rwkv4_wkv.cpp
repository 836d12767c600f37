// The WKV of RWKV-4 (Peng et al. 2023, appendix D), for each channel a mean of values with weights that decay:
//   out_t = (A_(t-1) + e^(u + k_t) v_t) / (B_(t-1) + e^(u + k_t)),  A_t = e^w A_(t-1) + e^(k_t) v_t,  B_t without v.
// Kept are aa = A e^-pp, bb = B e^-pp and pp, the largest logarithm so far: no exponential exceeds 1. pp cancels in the
// output, so gradients treat it as a constant; where the final aa, bb and pp are used apart it has one, which goes back
// along the larger of pp + w and k until k was the larger. A register holds channels, time runs in order. The backward
// computes states again: first those at the start of chunks, then, from right to left, those of a chunk. Of a factor of
// A and B together it keeps the gradient beside those of aa and bb, whose products with a mean of values would cancel.
#include "core/rwkv4_wkv.h"
#include "core/executor.h"
#include "cpu/channel_tile.h"
#include "cpu/chunks.h"
#include "cpu/decay.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace lcore::cpu::LCORE_ISA {
namespace {

constexpr int64_t kRegistersAnItem = 8;  // neighbours in memory: whole cache lines
constexpr double kNothingYet = -1e38;    // pp before the first step, in float's range

template <class T>
struct State {
  Vec<T> aa, bb, pp;
};

template <class T>
Vec<T> exponential(Vec<T> x) {
  return decay<false>(x, splat(kLog2E<T>));
}

// A step's exponentials. Of two that belong together the larger is 1, up to the rounding of pp, which is made good.
template <class T>
struct Weights {
  Vec<T> held, own;
};

template <class T>
Weights<T> reading(const State<T>& s, Vec<T> u, Vec<T> k) {
  const Vec<T> ahead = (s.pp - k) - u, e = exponential<T>(ahead > T{0} ? -ahead : ahead), one = splat(T{1});
  return {ahead > T{0} ? one : e, ahead > T{0} ? e : one};
}

// pp becomes `next`.
template <class T>
Weights<T> writing(const State<T>& s, Vec<T> w, Vec<T> k, Vec<T>* next) {
  const auto larger = s.pp + w > k;
  *next = larger ? s.pp + w : k;
  const Vec<T> kept = w + (s.pp - *next), e = exponential<T>(larger ? k - *next : kept), one = splat(T{1});
  return {larger ? one + kept : e, larger ? e : one};
}

template <class T>
void advance(State<T>& s, Vec<T> w, Vec<T> k, Vec<T> v) {
  Vec<T> next;
  const Weights<T> weights = writing(s, w, k, &next);
  s = {weights.held * s.aa + weights.own * v, weights.held * s.bb + weights.own, next};
}

// Not inlined, as the run of a backward: a second copy could have other multiply-adds.
template <class T>
[[gnu::noinline]] void advance(State<T>& state, Vec<T> w, Vec<T> u, int steps, const T* k, const T* v, T* out) {
  State<T> s = state;
  for (int i = 0; i < steps * kLanes<T>; i += kLanes<T>) {
    const Weights<T> weights = reading(s, u, load(k + i));
    store(out + i, (weights.held * s.aa + weights.own * load(v + i)) / (weights.held * s.bb + weights.own));
    advance(s, w, load(k + i), load(v + i));
  }
  state = s;
}

// A register of channels of one row.
struct Lane {
  int64_t row, first;
  int count;
};

template <class T>
Vec<T> load_parameter(const void* data, const Lane& lane) {
  alignas(64) T values[kLanes<T>] = {};
  std::copy_n(static_cast<const T*>(data) + lane.first, lane.count, values);
  return load(values);
}

inline Series state_rows(const States& s, const Lane& lane, int64_t sequence, int64_t dim) {
  const int64_t index = lane.row + sequence, slot = s.slots == nullptr ? index : s.slots[index];
  return at({s.data, s.type, 3 * dim, 1, dim}, slot, lane.first, 0);
}

template <class T>
State<T> load_state(const States& s, const Lane& lane, int64_t sequence, int64_t dim, T nothing) {
  if (s.data == nullptr) return {Vec<T>{}, Vec<T>{}, splat(nothing)};
  alignas(64) T rows[3 * kLanes<T>];
  load_tile(state_rows(s, lane, sequence, dim), lane.count, 3, rows);
  return {load(rows), load(rows + kLanes<T>), load(rows + 2 * kLanes<T>)};
}

template <class T>
void store_state(const State<T>& state, const States& s, const Lane& lane, int64_t sequence, int64_t dim) {
  alignas(64) T rows[3 * kLanes<T>];
  store(rows, state.aa);
  store(rows + kLanes<T>, state.bb);
  store(rows + 2 * kLanes<T>, state.pp);
  store_tile(rows, lane.count, 3, state_rows(s, lane, sequence, dim));
}

// Calls body(row, first register, registers, scratch) for every item.
template <class T, class Body>
void for_each_item(const Rwkv4Params& p, int64_t bytes, Executor& executor, const Body& body) {
  const int64_t registers = (p.dim + kLanes<T> - 1) / kLanes<T>;
  const int64_t parts = (registers + kRegistersAnItem - 1) / kRegistersAnItem;
  const Scratch scratch(bytes, executor.workers());
  executor.run(p.sequences.batch * parts, [&](int64_t item, int worker) {
    const int64_t first = item % parts * kRegistersAnItem;
    body(item / parts, first, std::min(kRegistersAnItem, registers - first), scratch.of(worker));
  });
}

template <class T>
Lane lane_of(const Rwkv4Params& p, int64_t row, int64_t index) {
  const int64_t first = index * kLanes<T>;
  return {row, first, static_cast<int>(std::min<int64_t>(kLanes<T>, p.dim - first))};
}

template <class T>
void run(const Rwkv4Params& p, Executor& executor) {
  constexpr int64_t kTile = kChunk * kLanes<T>;
  const std::vector<Chunk> chunks = chunks_of(p.sequences);
  for_each_item<T>(p, bytes_of<T>(3 * kTile), executor, [&](int64_t row, int64_t first, int64_t count, char* scratch) {
    T *k = reinterpret_cast<T*>(scratch), *v = k + kTile, *out = v + kTile;
    State<T> states[kRegistersAnItem];
    for (const Chunk& chunk : chunks) {
      if (p.initial.slots != nullptr && p.initial.slots[row + chunk.sequence] < 0) continue;
      for (int64_t r = 0; r < count; ++r) {
        const Lane lane = lane_of<T>(p, row, first + r);
        const Vec<T> w = load_parameter<T>(p.w, lane), u = load_parameter<T>(p.u, lane);
        State<T>& s = states[r];
        if (chunk.first) s = load_state<T>(p.initial, lane, chunk.sequence, p.dim, static_cast<T>(kNothingYet));
        load_tile(at(p.k, row, lane.first, chunk.begin), lane.count, chunk.steps, k);
        load_tile(at(p.v, row, lane.first, chunk.begin), lane.count, chunk.steps, v);
        advance(s, w, u, chunk.steps, k, v, out);
        store_tile(out, lane.count, chunk.steps, at(p.out, row, lane.first, chunk.begin));
        if (chunk.last) store_state(s, p.final, lane, chunk.sequence, p.dim);
      }
    }
  });
}

template <class T>
struct Gradients {
  const Rwkv4GradParams& g;
  const std::vector<Chunk>& chunks;
  State<T>* before;  // of the steps of a chunk
  T *k, *v, *dout;   // [steps][kLanes]; k and v become their gradients
  State<T>* starts;  // of chunks, [chunks]
  double* sums;      // [2][kLanes]: dw and du over the row

  Gradients(const Rwkv4GradParams& grads, const std::vector<Chunk>& all, Arena& arena) : g(grads), chunks(all) {
    before = arena.take<State<T>>(kChunk);
    for (T** tile : {&k, &v, &dout}) *tile = arena.take<T>(kChunk * kLanes<T>);
    starts = arena.take<State<T>>(static_cast<int64_t>(all.size()));
    sums = arena.take<double>(2 * kLanes<T>);
  }

  void load_inputs(const Lane& lane, const Chunk& chunk) {
    load_tile(at(g.forward.k, lane.row, lane.first, chunk.begin), lane.count, chunk.steps, k);
    load_tile(at(g.forward.v, lane.row, lane.first, chunk.begin), lane.count, chunk.steps, v);
  }

  [[gnu::noinline]] void run(const Lane& lane) {
    const Rwkv4Params& p = g.forward;
    const Vec<T> w = load_parameter<T>(p.w, lane), u = load_parameter<T>(p.u, lane);
    State<T> s{};
    for (size_t c = 0; c < chunks.size(); ++c) {
      if (chunks[c].first) s = load_state<T>(p.initial, lane, chunks[c].sequence, p.dim, static_cast<T>(kNothingYet));
      starts[c] = s;
      if (chunks[c].last) continue;
      load_inputs(lane, chunks[c]);
      for (int i = 0; i < chunks[c].steps * kLanes<T>; i += kLanes<T>) advance(s, w, load(k + i), load(v + i));
    }
    std::fill(sums, sums + 2 * kLanes<T>, 0.0);
    Slopes ds{};
    for (size_t c = chunks.size(); c-- > 0;) run_chunk(lane, chunks[c], w, u, starts[c], ds);
  }

  // Of a state: of pp, what it does to the final aa, bb and pp alone; of `scale`, a factor of A and B.
  struct Slopes {
    Vec<T> aa, bb, pp, scale;
  };

  // ds: of the state behind the chunk, then of that before it.
  void run_chunk(const Lane& lane, const Chunk& chunk, Vec<T> w, Vec<T> u, State<T> s, Slopes& ds) {
    const Rwkv4Params& p = g.forward;
    const DType type = p.is_double ? DType::kFloat64 : DType::kFloat32;
    load_inputs(lane, chunk);
    load_tile(at(g.dout, lane.row, lane.first, chunk.begin), lane.count, chunk.steps, dout);
    for (int t = 0; t < chunk.steps; ++t) {
      before[t] = s;
      advance(s, w, load(k + t * kLanes<T>), load(v + t * kLanes<T>));
    }
    if (chunk.last) {
      const State<T> d = load_state<T>({g.dfinal, type, nullptr}, lane, chunk.sequence, p.dim, T{0});
      const Vec<T> scale = d.aa * s.aa + d.bb * s.bb;
      ds = {d.aa, d.bb, d.pp - scale, scale};
    }
    Vec<T> dw{}, du{};
    for (int t = chunk.steps - 1; t >= 0; --t) step_left(t, w, u, ds, dw, du);
    for (int i = 0; i < kLanes<T>; ++i) {
      sums[i] += static_cast<double>(dw[i]);
      sums[kLanes<T> + i] += static_cast<double>(du[i]);
    }
    store_tile(k, lane.count, chunk.steps, at(g.dk, lane.row, lane.first, chunk.begin));
    store_tile(v, lane.count, chunk.steps, at(g.dv, lane.row, lane.first, chunk.begin));
    if (chunk.first && g.dinitial != nullptr) {
      const State<T> d = {ds.aa, ds.bb, ds.pp + ds.scale};
      store_state(d, {g.dinitial, type, nullptr}, lane, chunk.sequence, p.dim);
    }
  }

  void step_left(int t, Vec<T> w, Vec<T> u, Slopes& ds, Vec<T>& dw, Vec<T>& du) {
    T *key = k + t * kLanes<T>, *value = v + t * kLanes<T>;
    const Vec<T> kt = load(key), vt = load(value);
    const State<T>& s = before[t];
    const Weights<T> read = reading(s, u, kt);
    const Vec<T> norm = read.held * s.bb + read.own, y = (read.held * s.aa + read.own * vt) / norm;
    const Vec<T> dsum = load(dout + t * kLanes<T>) / norm, dnorm = -dsum * y;
    Vec<T> next;
    const Weights<T> written = writing(s, w, kt, &next);
    const Vec<T> down = read.own * (vt * dsum + dnorm), write = written.own * (vt * ds.aa + ds.bb);
    const auto larger = s.pp + w > kt;
    const Vec<T> kept = larger ? ds.pp : Vec<T>{};
    const Vec<T> through = larger ? ds.scale - write : written.held * (s.aa * ds.aa + s.bb * ds.bb);
    store(key, down + write + (ds.pp - kept));
    store(value, read.own * dsum + written.own * ds.aa);
    du += down;
    dw += through + kept;
    ds = {written.held * ds.aa + read.held * dsum, written.held * ds.bb + read.held * dnorm, kept, through - down};
  }
};

template <class T>
void run(const Rwkv4GradParams& g, Executor& executor) {
  const Rwkv4Params& p = g.forward;
  const std::vector<Chunk> chunks = chunks_of(p.sequences);
  const Scratch partial(bytes_of<double>(2 * p.dim), static_cast<int>(p.sequences.batch));  // [batch][2][dim]
  Arena measure(nullptr);
  Gradients<T>(g, chunks, measure);
  for_each_item<T>(p, measure.used(), executor, [&](int64_t row, int64_t first, int64_t count, char* scratch) {
    Arena arena(scratch);
    Gradients<T> gradients(g, chunks, arena);
    for (int64_t r = 0; r < count; ++r) {
      const Lane lane = lane_of<T>(p, row, first + r);
      gradients.run(lane);
      for (int64_t i : {0, 1}) {
        std::copy_n(gradients.sums + i * kLanes<T>, lane.count, partial.of<double>(row) + i * p.dim + lane.first);
      }
    }
  });
  for (int64_t i = 0; i < 2 * p.dim; ++i) {
    double sum = 0;
    for (int64_t row = 0; row < p.sequences.batch; ++row) sum += partial.of<double>(row)[i];
    (i < p.dim ? static_cast<T*>(g.dw) + i : static_cast<T*>(g.du) + (i - p.dim))[0] = static_cast<T>(sum);
  }
}

}  // namespace

void rwkv4_wkv(const Rwkv4Params& p, Executor& executor) {
  if (p.is_double) return run<double>(p, executor);
  return run<float>(p, executor);
}

void rwkv4_wkv_backward(const Rwkv4GradParams& g, Executor& executor) {
  if (g.forward.is_double) return run<double>(g, executor);
  return run<float>(g, executor);
}

}  // namespace lcore::cpu::LCORE_ISA
